"""The all-reduce kernels that the library must hold: by their names, and by the calls that they run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from llm_allreduce_plugin import _C

ALL_TYPES = ("bf16", "fp16", "fp32")
SIXTEEN_BITS = ALL_TYPES[:2]
TYPE_CODES = {"fp32": 0, "fp16": 1, "bf16": 2}  # lar_dtype
FORMS = ("any", "short", "split", "wide", "bulk", "pull")  # lar::Form
WIRES = {
    "raw": _C.WIRE_RAW,
    "fp8": _C.WIRE_FP8,
    "tq3": _C.WIRE_TQ3,
    "hadamard2": _C.WIRE_HADAMARD2,
    "fp8_group": _C.WIRE_FP8_GROUP,
}
COMPRESSED = tuple(WIRES)[1:]
ANY_OWNER = COMPRESSED[:-1]  # formats of rings and hierarchies, whose sums depend on who owns what
ANY = 0  # in the place of a world size: one kernel serves them all
FIXED = (2, 4, 8)  # world sizes of which in-band kernels are compiled for one
RELEASER = 32  # threads of a block beside those of a launch


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Those of one template: name, the calls that they run, and threads of a launch at most, and beside those."""

    name: str
    algorithm: int
    exchange: int
    form: str = "any"
    wires: tuple[str, ...] = ("raw",)
    types: tuple[str, ...] = ALL_TYPES
    world_sizes: tuple[int, ...] = (ANY,)
    most_threads: int = _C.MAX_FLAGGED_THREADS
    extra_threads: int = RELEASER
    resident: bool = False
    epilogue: int = _C.STORE
    units: int = 0  # of a row to a thread, where the kernel is compiled for it


@dataclasses.dataclass(frozen=True, order=True)
class Kernel:
    """One of them."""

    name: str
    wire: str
    type: str
    world_size: int


def _in_band(
    name: str,
    algorithm: int,
    exchange: int = _C.PUSH,
    world_sizes: tuple[int, ...] = (*FIXED, ANY),
    **what: str | tuple[str, ...],
) -> Kernels:
    return Kernels(
        name,
        algorithm,
        exchange,
        world_sizes=world_sizes,
        most_threads=_C.MAX_THREADS,
        extra_threads=0,
        **what,  # type: ignore[arg-type]
    )


def _rows(
    name: str, algorithm: int, units: int, form: str, world_sizes: tuple[int, ...], most_threads: int = _C.MAX_THREADS
) -> Kernels:
    return Kernels(
        name,
        algorithm,
        _C.PUSH,
        form=form,
        types=SIXTEEN_BITS,
        world_sizes=world_sizes,
        most_threads=most_threads,
        extra_threads=0,
        epilogue=_C.RMS_NORM,
        units=units,
    )


_FP8 = {"wires": ("fp8",), "types": SIXTEEN_BITS}
_GROUPS = {"wires": ("fp8_group",), "types": SIXTEEN_BITS}
_ANY_OWNER = {"wires": ANY_OWNER, "types": SIXTEEN_BITS}
_PACKETS = {"wires": COMPRESSED, "types": SIXTEEN_BITS}
ALL = (
    _in_band("one_shot_short_kernel", _C.ONE_SHOT, form="short"),
    _in_band("one_shot_push_kernel", _C.ONE_SHOT),
    _in_band("one_shot_bulk_kernel", _C.ONE_SHOT, form="bulk"),
    _in_band("one_shot_split_kernel", _C.ONE_SHOT, form="split"),
    _in_band("two_shot_short_kernel", _C.TWO_SHOT, form="short"),
    _in_band("two_shot_push_kernel", _C.TWO_SHOT),
    _in_band("two_shot_split_kernel", _C.TWO_SHOT, form="split"),
    _in_band("two_shot_pull_kernel", _C.TWO_SHOT, _C.PULL),
    _in_band("one_shot_multicast_short_kernel", _C.ONE_SHOT, _C.MULTICAST, form="short"),
    _in_band("one_shot_multicast_kernel", _C.ONE_SHOT, _C.MULTICAST),
    _in_band("two_shot_multicast_short_kernel", _C.TWO_SHOT, _C.MULTICAST, form="short"),
    _in_band("two_shot_multicast_kernel", _C.TWO_SHOT, _C.MULTICAST),
    _in_band("two_shot_multicast_split_kernel", _C.TWO_SHOT, _C.MULTICAST, form="split"),
    _in_band("two_shot_in_switch_kernel", _C.TWO_SHOT, _C.IN_SWITCH),
    _in_band("two_shot_place_kernel", _C.TWO_SHOT, _C.PLACE),
    _in_band("two_shot_place_split_kernel", _C.TWO_SHOT, _C.PLACE, form="split"),
    _in_band("two_shot_place_pull_kernel", _C.TWO_SHOT, _C.PLACE, form="pull"),
    _in_band("one_shot_short_fp8_kernel", _C.ONE_SHOT, world_sizes=(2, ANY), form="short", **_FP8),
    _in_band("one_shot_push_fp8_kernel", _C.ONE_SHOT, world_sizes=(2, ANY), **_FP8),
    _in_band("one_shot_short_fp8_kernel", _C.ONE_SHOT, world_sizes=(2, ANY), form="short", **_GROUPS),
    _in_band("one_shot_push_fp8_kernel", _C.ONE_SHOT, world_sizes=(2, ANY), **_GROUPS),
    _in_band("two_shot_push_fp8_kernel", _C.TWO_SHOT, **_FP8),
    _in_band("two_shot_split_fp8_kernel", _C.TWO_SHOT, form="split", **_FP8),
    _in_band("two_shot_push_fp8_kernel", _C.TWO_SHOT, world_sizes=(4, ANY), **_GROUPS),
    _in_band("two_shot_split_fp8_kernel", _C.TWO_SHOT, world_sizes=(4, ANY), form="split", **_GROUPS),
    Kernels("one_shot_shared_kernel", _C.ONE_SHOT, _C.SHARED, world_sizes=(2, ANY)),
    Kernels("two_shot_shared_kernel", _C.TWO_SHOT, _C.SHARED, world_sizes=(2, ANY)),
    Kernels("one_shot_shared_fp8_kernel", _C.ONE_SHOT, _C.SHARED, world_sizes=(2, ANY), **_FP8),
    Kernels("two_shot_shared_fp8_kernel", _C.TWO_SHOT, _C.SHARED, world_sizes=(2, ANY), **_FP8),
    Kernels("two_shot_shared_fp8_kernel", _C.TWO_SHOT, _C.SHARED, **_GROUPS),
    Kernels("one_shot_flags_kernel", _C.ONE_SHOT, _C.FLAGS),
    Kernels("two_shot_flags_kernel", _C.TWO_SHOT, _C.FLAGS),
    Kernels("two_shot_flags_kernel", _C.TWO_SHOT, _C.FLAGS, **_PACKETS),
    *(
        Kernels(
            "two_shot_staged_kernel",
            _C.TWO_SHOT,
            _C.STAGED,
            wires=wires,
            types=types,
            most_threads=_C.MAX_STAGED_THREADS,
            resident=True,
        )
        for wires, types in ((("raw",), ALL_TYPES), (COMPRESSED, SIXTEEN_BITS))
    ),
    Kernels("ring_flags_kernel", _C.RING, _C.FLAGS, extra_threads=0, **_ANY_OWNER),
    Kernels("hierarchical_flags_kernel", _C.HIERARCHICAL, _C.FLAGS, **_ANY_OWNER),
    Kernels("reduce_flags_kernel", _C.REDUCE, _C.FLAGS),
    Kernels("reduce_scatter_flags_kernel", _C.REDUCE_SCATTER, _C.FLAGS),
    Kernels("host_sum_gather_flags_kernel", _C.HOST_SUM_GATHER, _C.FLAGS),
    Kernels("host_sum_flags_kernel", _C.HOST_SUM, _C.FLAGS, extra_threads=0),
    _rows("one_shot_push_norm_kernel", _C.ONE_SHOT, 1, "short", (*FIXED, ANY)),
    _rows("one_shot_push_norm_kernel", _C.ONE_SHOT, 1, "wide", (2,), _C.MAX_WIDE_THREADS),
    _rows("one_shot_push_norm_kernel", _C.ONE_SHOT, 2, "any", (2, ANY)),
    _rows("one_shot_split_norm_kernel", _C.ONE_SHOT, 2, "split", (2, ANY)),
    _rows("two_shot_push_norm_kernel", _C.TWO_SHOT, 1, "short", (4, 8, ANY)),
    _rows("two_shot_push_norm_kernel", _C.TWO_SHOT, 2, "any", (ANY,)),
    _rows("two_shot_split_norm_kernel", _C.TWO_SHOT, 2, "split", (ANY,)),
    Kernels("one_shot_shared_norm_kernel", _C.ONE_SHOT, _C.SHARED, types=SIXTEEN_BITS, epilogue=_C.RMS_NORM),
)


def _with_units(name: str, units: int, most_threads: int) -> str:
    """How a kernel of rows is told from others of its template."""
    if not units:
        return name
    return f"{name}<{units}, wide>" if most_threads == _C.MAX_WIDE_THREADS else f"{name}<{units}>"


def expected() -> Iterator[tuple[Kernel, Kernels]]:
    """Every kernel, and what it is one of."""
    for kernels in ALL:
        for wire in kernels.wires:
            for dtype in kernels.types:
                for world_size in kernels.world_sizes:
                    name = _with_units(kernels.name, kernels.units, kernels.most_threads)
                    yield Kernel(name, wire, dtype, world_size), kernels


_MANGLED_TYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
_MANGLED_WIRES = {
    "Fp8GroupPacket": "fp8_group",
    "Fp8Packet": "fp8",
    "Tq3": "tq3",
    "Hadamard2": "hadamard2",
    "_fp8_kernel": "fp8",
}
_NAME = re.compile(
    r"(?P<name>(?:one_shot|two_shot|ring|hierarchical|reduce|host_sum)(?:_(?!cu_)[a-z0-9]+)*_kernel)"
    r"I(?:NS_\d+\w+UnitsI)?(?P<type>f|6__half|13__nv_bfloat16)(?:Li(?P<ranks>\d+)E)?(?:Li(?P<units>\d+)E)?"
    r"(?:Li(?P<threads>\d+)E)?"
)


def kernel_of(mangled: str) -> Kernel | None:
    """Which all-reduce kernel this name in the library is; None: none (codecs and probes)."""
    match = _NAME.search(mangled)
    if match is None:
        return None
    found = mangled[match.start() :]
    wire = next((wire for part, wire in _MANGLED_WIRES.items() if part in found), "raw")
    name = _with_units(match["name"], int(match["units"] or 0), int(match["threads"] or 0))
    return Kernel(name, wire, _MANGLED_TYPES[match["type"]], int(match["ranks"] or ANY))
