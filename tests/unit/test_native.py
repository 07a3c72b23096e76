"""The native library: what it needs, what it holds, and what it refuses."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import llm_allreduce_plugin
from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.facts import SUPPORTED_WORLD_SIZES
from llm_allreduce_plugin.runtime.failures import error_of_status
from llm_allreduce_plugin.transport.symmetric import initialize
from scripts import register_report
from tests.support import kernel_list
from tests.support.cuda_tools import cuobjdump, kernel_resources, library_path, ptx_of_kernels, runs_on

FOLDER = Path(llm_allreduce_plugin._C.__file__).parent
LIBRARY = library_path()
SOURCE = Path(__file__).parents[2] / "csrc"


def output(*command: str | Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}  # ldd would list it as needed
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


@pytest.mark.parametrize("path", (LIBRARY, Path(_C.__file__)), ids=("library", "bindings"))
def test_needs_nothing_of_cuda_or_torch(path: Path) -> None:
    needed = re.findall(r"NEEDED.*\[(.*?)\]", output("readelf", "-d", path))
    allowed = re.compile(r"lib(c|m|stdc\+\+|gcc_s|dl|rt|pthread|llm_allreduce)\.so.*|ld-linux.*")
    assert needed
    assert [name for name in needed if not allowed.fullmatch(name)] == []
    assert not re.search(r"torch|cudart|nccl", output("ldd", path))


def test_the_bindings_load_the_library_beside_them() -> None:
    """Whatever LD_LIBRARY_PATH says: that comes after DT_RPATH, but before DT_RUNPATH."""
    dynamic = output("readelf", "-d", Path(_C.__file__))
    assert re.findall(r"\((RPATH|RUNPATH)\).*\[(.*?)\]", dynamic) == [("RPATH", "$ORIGIN")]


def test_exports_only_the_c_abi() -> None:
    """The static CUDA runtime stays private: torch brings its own."""
    exported = {line.split()[-1] for line in output("nm", "-D", "--defined-only", LIBRARY).splitlines()}
    header = (SOURCE / "include" / "llm_allreduce.h").read_text()
    declared = set(re.findall(r"LAR_EXPORT .*?(lar_\w+)\(", header))
    assert declared <= exported
    assert {name for name in exported if name.startswith("lar_")} == declared
    assert not [name for name in exported if name.startswith(("cuda", "cu", "_ZN2at", "_ZN3c10"))]
    undefined = output("nm", "-D", "--undefined-only", LIBRARY)
    assert not re.search(r"\bcuda\w+|\bcu[A-Z]\w+|torch", undefined)


def architectures() -> list[str]:
    return os.environ.get("LLM_ALLREDUCE_CUDA_ARCHS", "80;86;89;90;100;120").split(";")


def test_machine_code_for_every_architecture_asked_for() -> None:
    asked = architectures()
    listed = set(re.findall(r"sm_(\d+)", cuobjdump("--list-elf", LIBRARY)))
    assert listed <= set(asked)
    assert [each for each in asked if not any(runs_on(code, each) for code in listed)] == []
    ptx = {int(version) for version in re.findall(r"sm_(\d+)", cuobjdump("--list-ptx", LIBRARY))}
    assert max(ptx) >= min(int(asked[-1]), 90), "PTX for GPUs to come; newer ones are given that of 90"


def test_the_library_holds_the_kernels_that_it_should() -> None:
    """None is missing on any architecture, none is there twice, and tests/support/kernel_list.py knows all.

    Of two architectures of a generation one may run the machine code of the other, but not where FP8 is converted: only
    from 89 on there are instructions for it.
    """
    held: list[tuple[kernel_list.Kernel, str]] = []
    for resources in kernel_resources(LIBRARY):
        kernel = kernel_list.kernel_of(resources.name)
        if kernel is not None:
            held.append((kernel, resources.architecture))
        else:
            assert re.search("codec_cu|probe_cu|rms_norm_cu", resources.name), (
                f"{resources.name}: no kernel that is known"
            )
    assert len(set(held)) == len(held)
    expected = dict(kernel_list.expected())
    assert {kernel for kernel, _ in held} == set(expected)
    for kernel, asked in itertools.product(expected, architectures()):
        codes = [code for holder, code in held if holder == kernel and runs_on(code, asked)]
        assert codes, f"{kernel} on sm_{asked}"
        if converts_fp8(kernel, expected[kernel]) and asked == "89":
            assert "89" in codes, f"{kernel}: software FP8 on a GPU that has instructions for it"


def converts_fp8(kernel: kernel_list.Kernel, of: kernel_list.Kernels) -> bool:
    return kernel.wire in ("fp8", "fp8_group") or of.epilogue == _C.RMS_NORM


def test_kernels_use_what_newer_architectures_have() -> None:
    """Dependent launch from 90 on, but where kernels wait for flags; conversions of FP8 from 89 on.

    As PTX says it: no kernel is made of one that is too old for it (csrc/CMakeLists.txt).
    """
    newest = max(map(int, architectures()))
    expected = dict(kernel_list.expected())
    found = {}
    for (_, name), ptx in ptx_of_kernels(LIBRARY).items():
        if kernel := kernel_list.kernel_of(name):
            found[kernel] = ptx
        elif "norm" in name or "Fp8" in name:
            assert ("e4m3x2" in ptx) == (newest >= 89), name
    assert found.keys() == expected.keys()
    for kernel, ptx in found.items():
        early = expected[kernel].exchange not in (_C.FLAGS, _C.STAGED)
        assert ("griddepcontrol.wait" in ptx) == (early and newest >= 90), kernel
        assert ("e4m3x2" in ptx) == (converts_fp8(kernel, expected[kernel]) and newest >= 89), kernel


def test_no_kernel_spills() -> None:
    """No local memory: no spills, no arrays that fell out of registers. The largest block fits the registers."""
    resources = kernel_resources(LIBRARY)
    assert [kernel for kernel in resources if kernel.stack or kernel.local] == []
    threads = {kernel: of.most_threads + of.extra_threads for kernel, of in kernel_list.expected()}
    seen = 0
    for each in resources:
        kernel = kernel_list.kernel_of(each.name)
        if kernel is None:
            continue
        seen += 1
        allocated = -(-each.registers // 8) * 8 * 32  # of a warp
        warps = -(-threads[kernel] // 128)  # of a block, on each of the four partitions of a multiprocessor
        assert allocated * warps <= 65536 // 4, f"a block of {kernel} on sm_{each.architecture} must fit"
    assert seen >= len(threads)


def test_register_report_has_every_kernel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["register_report.py"])
    register_report.main()
    report = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]
    columns = rows[0]
    told = {
        (name.strip("`"), wire, dtype, 0 if column == "any" else int(column), architecture)
        for name, wire, dtype, architecture, *cells in rows[2:]
        for column, cell in zip(columns[4:], cells, strict=True)
        if cell
    }
    found = [(kernel_list.kernel_of(each.name), each.architecture) for each in kernel_resources(LIBRARY)]
    expected = {
        (kernel.name, kernel.wire, kernel.type, kernel.world_size, architecture)
        for kernel, architecture in found
        if kernel is not None
    }
    assert {kernel for kernel, _ in found if kernel is not None} == {kernel for kernel, _ in kernel_list.expected()}
    assert told == expected


def counts(layout: _C.Layout, *, in_band: bool) -> tuple[int, int, int]:
    """Slots for ONESHOT, scatter and gather, where these have regions of their own."""
    if in_band:
        assert layout.shared
        return 4, 4 * (layout.world_size - 1), 4
    once = 4 * layout.lanes
    pushed = once * layout.world_size
    return (once, pushed, once) if layout.shared else (pushed, pushed, pushed)


def check_pushed(layout: _C.Layout, size: int) -> None:
    """Two generations of whole lines, each of which the slots of either algorithm fill."""
    slots, peers = layout.in_band, layout.world_size - 1
    first = slots.one_shot_offset
    assert first == slots.scatter_offset
    assert first % 256 == 0
    assert first >= layout.probe_offset + 256, "regions do not overlap"
    assert slots.generation_bytes % 256 == 0
    assert size - 512 < 2 * slots.generation_bytes <= size
    assert slots.gather_offset == first + peers * slots.two_shot_bytes
    for number, each in ((peers, slots.one_shot_bytes), (2 * peers, slots.two_shot_bytes)):
        assert each >= _C.VECTOR_BYTES
        unit = 256 if each >= 256 else _C.VECTOR_BYTES
        assert each % unit == 0, "slots start on cache lines"
        assert slots.generation_bytes - unit * number < number * each <= slots.generation_bytes


@given(st.integers(-1, 20), st.integers(-1, 1100), st.integers(0, 1 << 28), st.integers(0, 1 << 28), st.booleans())
def test_layout_fits_or_is_refused(world_size: int, lanes: int, in_band: int, flagged: int, shared: bool) -> None:
    try:
        layout = _C.make_layout(world_size, lanes, in_band_bytes=in_band, flagged_bytes=flagged, shared=shared)
    except ValueError as error:
        wish = f"world_size={world_size}, lanes={lanes}, in_band_bytes={in_band}, flagged_bytes={flagged}"
        assert wish in str(error)
        return
    assert world_size in SUPPORTED_WORLD_SIZES
    assert 1 <= lanes <= _C.MAX_LANES
    end = layout.probe_offset + 256
    assert 0 < layout.stages_offset <= layout.local_bytes - _C.STAGE_TIMES * 3 * 8
    assert layout.local_bytes <= layout.flags_offset
    for is_in_band, slots, size in ((True, layout.in_band, in_band), (False, layout.flagged, flagged)):
        if size == 0:
            assert (slots.one_shot_bytes, slots.two_shot_bytes, slots.staged_bytes) == (0, 0, 0)
            continue
        if is_in_band and not shared:
            check_pushed(layout, size)
            assert slots.staged_bytes == 0
            end = slots.one_shot_offset + 2 * slots.generation_bytes
            continue
        assert slots.generation_bytes == 0
        numbers = counts(layout, in_band=is_in_band)
        bytes_each = (slots.one_shot_bytes, slots.two_shot_bytes, slots.two_shot_bytes)
        # One slot to a rank, of all that is there for scatter, or for gather.
        staged = 0 if is_in_band or shared else numbers[1] * slots.two_shot_bytes // world_size
        assert slots.staged_bytes == staged
        used = 0
        for offset, number, each in zip(
            (slots.one_shot_offset, slots.scatter_offset, slots.gather_offset), numbers, bytes_each, strict=True
        ):
            assert offset % 256 == 0
            assert offset >= end, "regions do not overlap"
            assert each >= _C.VECTOR_BYTES
            assert each % (256 if each >= 256 else _C.VECTOR_BYTES) == 0, "slots start on cache lines"
            end = offset + number * each
            used += number * each
        assert used <= size
        # Little is left over: the splits round down by less than a cache line per slot.
        assert used >= size - sum(numbers) * 256 - 1024
    assert layout.total_bytes >= end
    assert layout.total_bytes % 256 == 0


def test_in_band_slots_in_host_memory_start_with_the_marker() -> None:
    layout = _C.make_layout(4, 3, in_band_bytes=1 << 16, flagged_bytes=1 << 18, shared=True)
    buffer = (ctypes.c_uint32 * (layout.total_bytes // 4))()
    initialize(torch.frombuffer(buffer, dtype=torch.uint8), layout)
    marked = [word == _C.IN_BAND_MARKER for word in buffer]
    first, end = layout.in_band.one_shot_offset // 4, layout.flagged.one_shot_offset // 4
    assert all(marked[first:end])
    assert not any(marked[:first] + marked[end:])


def cpu_workspace(timeout_s: float = 1.0) -> tuple[_C.Workspace, list[ctypes.Array[ctypes.c_char]]]:
    layout = _C.make_layout(2, 1, flagged_bytes=1 << 16)
    buffers = [ctypes.create_string_buffer(layout.total_bytes) for _ in range(2)]
    return _C.Workspace(0, [ctypes.addressof(b) for b in buffers], layout, timeout_s, _C.CPU), buffers


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"dtype": 3}, "dtype: there is none of this number"),
        ({"dtype": -1}, "dtype: there is none of this number"),
        ({"count": -1}, "count: negative"),
        ({"lanes": 0}, "lanes: not from 1 to those of the workspace"),
        ({"lanes": 2}, "lanes: not from 1 to those of the workspace"),
        ({"threads": 33}, "threads: not whole warps, or more than kernels of this exchange take"),
        ({"threads": 512}, "threads: not whole warps, or more than kernels of this exchange take"),
        ({"chunk_vectors": 0}, "chunk_vectors: less than one"),
        ({"chunk_vectors": 1 << 30}, "chunk_vectors: more than a slot holds"),
        ({"input": 0}, "input, output: null"),
        ({"output": 0}, "input, output: null"),
        ({"scatter_lanes": 1}, "scatter_lanes, drain_lanes: leave no lane for the rest"),
        ({"drain_lanes": 1}, "scatter_lanes, drain_lanes: leave no lane for the rest"),
        ({"scatter_lanes": -1}, "scatter_lanes, drain_lanes: negative"),
        ({"exchange": _C.STAGED}, "exchange: the workspace has no slots or memory for it"),
        ({"hosts": 1}, "hosts: only of calls that sum hosts' sums"),
        ({"pools": True}, "pools: only of calls that are placed, and of all of them"),
    ],
    ids=str,
)
@pytest.mark.parametrize("algorithm", (_C.ONE_SHOT, _C.TWO_SHOT), ids=("one_shot", "two_shot"))
def test_calls_that_no_kernel_may_be_given(algorithm: int, change: dict[str, Any], refusal: str) -> None:
    workspace, _buffers = cpu_workspace()
    data = ctypes.create_string_buffer(64)
    address = ctypes.addressof(data)
    plan: dict[str, Any] = {"count": 4, "dtype": 0, "lanes": 1, "threads": 32, "chunk_vectors": 1, "exchange": _C.FLAGS}
    call = {"input": address, "output": address}
    plan |= {key: value for key, value in change.items() if key not in call}
    call |= {key: value for key, value in change.items() if key in call}
    if plan.pop("pools", False):
        plan["pools"] = [address, address]
    status = _C.Plan(workspace, algorithm=algorithm, **plan)(**call)
    assert status == _C.STATUS_INVALID_ARGUMENT
    assert _C.error_string(status) == "invalid argument"
    assert _C.refusal() == refusal
    assert str(error_of_status(status, "ONESHOT")) == f"ONESHOT: invalid argument ({refusal})"
    assert workspace.failure() is None


def test_every_refusal_says_why() -> None:
    """Otherwise lar_refusal() would say what was wrong with a call before."""
    silent = [
        f"{path.relative_to(SOURCE)}: {line.strip()}"
        for path in sorted(SOURCE.rglob("*.c*"))
        if path.name != "refusal.cpp"
        for line in path.read_text().splitlines()
        if re.search(r"[=?:] *LAR_ERROR_INVALID_ARGUMENT|return LAR_ERROR_INVALID_ARGUMENT", line)
    ]
    assert silent == []


_NO_MEMORY = """
import ctypes, resource
from llm_allreduce_plugin import _C
layout = _C.make_layout(2, 1, flagged_bytes=1 << 16)
buffers = [ctypes.create_string_buffer(layout.total_bytes) for _ in range(2)]
bases = [ctypes.addressof(buffer) for buffer in buffers]
spare = [_C.Workspace(0, bases, layout, 1.0, _C.CPU) for _ in range(8)]
del spare  # so that what else a workspace takes, and an error, is there without a page more
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (1 << 20, most))  # less than the process has: no page more
try:
    _C.Workspace(0, bases, layout, 1.0, _C.CPU)
except RuntimeError as error:
    text = str(error)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
print(text)
"""


def test_a_workspace_without_memory_for_its_record_says_so() -> None:
    run = subprocess.run([sys.executable, "-c", _NO_MEMORY], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "failure record: no memory, or as many mappings as a process may have"


def test_a_record_of_a_failed_exchange_stays_when_a_wait_expires() -> None:
    """It is the first that counts, and no field of it may come from the second."""
    workspace, _buffers = cpu_workspace(timeout_s=0.5)
    data = ctypes.create_string_buffer(64)
    address = ctypes.addressof(data)
    plan = _C.Plan(
        workspace, algorithm=_C.ONE_SHOT, exchange=_C.FLAGS, count=4, dtype=0, lanes=1, threads=32, chunk_vectors=1
    )
    call = threading.Thread(target=plan, args=(address, address))
    call.start()
    time.sleep(0.1)  # it waits for its peer
    workspace.fail_exchange(1.5)
    before = workspace.failure()
    call.join()
    assert before is not None
    assert before[7] == 1.5
    assert workspace.failure() == before
    assert workspace.reason() == _C.REASON_EXCHANGE


def test_an_absent_peer_is_recorded() -> None:
    workspace, _buffers = cpu_workspace(timeout_s=0.05)
    data = ctypes.create_string_buffer(64)
    address = ctypes.addressof(data)
    one_shot, two_shot = (
        _C.Plan(
            workspace,
            algorithm=algorithm,
            exchange=_C.FLAGS,
            count=4,
            dtype=0,
            lanes=1,
            threads=32,
            chunk_vectors=1,
        )
        for algorithm in (_C.ONE_SHOT, _C.TWO_SHOT)
    )
    assert two_shot(address, address) == _C.STATUS_TIMEOUT
    record = workspace.failure()
    assert record is not None
    assert record[:2] == (0, 1)
    assert one_shot(address, address) == _C.STATUS_TIMEOUT, "broken for good, at once"


def test_type_stub_is_up_to_date() -> None:
    """The build writes one; the source tree carries a copy for the type checker."""
    built = FOLDER / "_C.pyi"
    kept = Path(__file__).parents[2] / "llm_allreduce_plugin" / "_C.pyi"
    assert kept.read_text() == built.read_text(), f"copy {built} over {kept}"


def test_workspace_arguments() -> None:
    layout = _C.make_layout(2, 1, flagged_bytes=1 << 16)
    with pytest.raises(ValueError, match="got 1 addresses for world size 2"):
        _C.Workspace(0, [1], layout, 1.0, _C.CPU)
    with pytest.raises(ValueError, match="2 is not in a group of 2"):
        _C.Workspace(2, [1, 2], layout, 1.0, _C.CPU)
    with pytest.raises(ValueError, match="timeout_s"):
        _C.Workspace(0, [1, 2], layout, 0.0, _C.CPU)
