"""Launch shapes through host memory: every kernel at every size over blocks and threads, each verified, then timed.

    python benchmarks/host_shapes.py --gpus 4 --out benchmarks/h200/host_shapes_tp4.json

What a node without peer access gets. The tables of the package for host memory come from these. Microseconds per call
in a CUDA graph, bf16. ``chunk``: vectors (of LOWPRECISION packets) that a lane moves to one peer at a time.
``lanes_of_workspace``: more of them leave each a smaller slot.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.group.layouts import DEFAULT_HOST_WORKSPACE_BYTES, host_layout
from llm_allreduce_plugin.measure.answers import MOST_ERROR, make_case, relative_error, wrong_elements
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from llm_allreduce_plugin.measure.timing import call_of, time_graph
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from llm_allreduce_plugin.transport.host import HostMemory
from llm_allreduce_plugin.wire import PACKETS

DTYPE = torch.bfloat16
KIB, MIB = 1 << 10, 1 << 20
WORKERS = 256
MOST_VECTORS_OF_A_THREAD = 4  # in band
# kernel, bytes, lanes, threads, vectors or packets in a chunk
Shape = tuple[str, int, int, int, int]


def wire_of(kernel: str) -> WireFormat | None:
    """Of ``"fp8"``, ``"fp8 in band"`` or ``"fp8 ONESHOT in band"``; None of an exact kernel."""
    name = kernel.split(maxsplit=1)[0]
    return WireFormat(name) if name in set(WireFormat) else None


def shapes_of(world_size: int, lanes: int, *, small: bool) -> list[Shape]:
    """What is worth trying with a workspace of so many lanes."""
    shapes: list[Shape] = []
    if small:
        in_band = [4 * KIB, 16 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB]
        for size, threads in itertools.product(in_band, (64, 128, 256)):
            used = math.ceil(size / 16 / threads)
            if used <= lanes * MOST_VECTORS_OF_A_THREAD:
                shapes.append(("ONESHOT in band", size, min(used, lanes), threads, size // 16))
            packets = math.ceil(size / DTYPE.itemsize / PACKETS[WireFormat.FP8].values)
            used = min(lanes, math.ceil(packets * 32 / threads))
            shapes.append(("fp8 ONESHOT in band", size, used, threads, packets))
        for size, threads in itertools.product([64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB], (64, 128, 256)):
            vectors = math.ceil(size / 16 / world_size)
            used = min(lanes, math.ceil(vectors / threads))
            shapes.append(("TWOSHOT in band", size, used, threads, vectors))
            packets = math.ceil(size / DTYPE.itemsize / PACKETS[WireFormat.FP8].values / world_size)
            used = min(lanes, math.ceil(packets * 32 / threads))
            shapes.append(("fp8 in band", size, used, threads, packets))
    one_shot = [64 * KIB, 256 * KIB, 512 * KIB, MIB] + [2 * MIB, 4 * MIB, 16 * MIB, 64 * MIB] * (world_size == 2)
    kernels: dict[str, tuple[list[int], int, int]] = {"ONESHOT flagged": (one_shot, 1, WORKERS)}
    if world_size > 2:
        sizes = [128 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB]
        kernels["TWOSHOT flagged"] = (sizes, world_size, WORKERS)
    for wire in (WireFormat.FP8, WireFormat.TQ3):
        kernels[wire] = ([256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB], world_size, WORKERS // 32)
    for kernel, (sizes, parts, unit) in kernels.items():
        format_ = wire_of(kernel)
        unit_bytes = 16 if format_ is None else PACKETS[format_].values * DTYPE.itemsize
        for size, used, units in itertools.product(sizes, (8, 16, 32, 64, 128), (1, 2, 3, 4)):
            pieces = math.ceil(size / unit_bytes / parts / used)  # of a lane
            least = 8 if size <= MIB else 32
            if least <= used <= lanes and unit * (units - 1) < pieces:
                shapes.append((kernel, size, used, WORKERS, unit * units))
    return shapes


def plan_of(workspace: _C.Workspace, layout: _C.Layout, shape: Shape) -> _C.Plan | None:
    """The call that a shape stands for; None when its chunks are too large for the slots."""
    kernel, size, lanes, threads, chunk = shape
    count, code = size // DTYPE.itemsize, DTYPE_CODES[DTYPE]
    one_shot = "ONESHOT" in kernel
    in_band = kernel.endswith("in band")
    slots = layout.in_band if in_band else layout.flagged
    format_ = wire_of(kernel)
    wire = None if format_ is None else PACKETS[format_]
    vectors = chunk if wire is None else chunk * wire.bytes // 16
    if vectors * 16 > (slots.one_shot_bytes if one_shot else slots.two_shot_bytes):
        return None
    return _C.Plan(
        workspace,
        algorithm=_C.ONE_SHOT if one_shot else _C.TWO_SHOT,
        exchange=_C.SHARED if in_band else _C.FLAGS,
        wire=_C.WIRE_RAW if wire is None else wire.code,
        count=count,
        dtype=code,
        lanes=lanes,
        threads=threads,
        chunk_vectors=vectors,
    )


def measure(context: RankContext, shapes: list[Shape], lanes: int) -> list[dict[str, Any]]:
    """Collective: one workspace, all shapes."""
    layout = host_layout(context.world_size, lanes, DEFAULT_HOST_WORKSPACE_BYTES // context.world_size)
    memory = HostMemory.open(Agreement(context.control_group, 300.0), context.device, layout)
    workspace = _C.Workspace(context.rank, memory.bases, layout, 10.0, context.device.index, memory.local)
    rows = []
    data: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for shape in shapes:
        kernel, payload, used, threads, chunk = shape
        if (plan := plan_of(workspace, layout, shape)) is None:
            continue
        count = payload // DTYPE.itemsize
        if count not in data:
            data.clear()
            data[count] = make_case(context, count, DTYPE)
        mine, expected = data[count]
        output = torch.full_like(mine, float("nan"))
        timing = time_graph(context, call_of(plan, mine, output))
        if (wire := wire_of(kernel)) is not None:
            wrong = int(relative_error(output, expected) > MOST_ERROR[wire])
        else:
            wrong = wrong_elements(output, expected, exact=True, world_size=context.world_size)
        row = {"kernel": kernel, "bytes": payload, "lanes": used, "threads": threads, "chunk": chunk}
        row |= {"lanes_of_workspace": lanes}
        row |= {"us": round(timing.median, 2), "fastest_us": round(timing.fastest, 2)}
        rows.append(row | {"wrong": sum(context.gather(wrong))})
    torch.cuda.synchronize()
    del workspace
    memory.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--lanes", type=int, nargs="+", default=[32, 64, 128], help="of the workspace")
    parser.add_argument("--largest", type=int, default=64 * MIB, help="bytes of the largest message")
    parser.add_argument("--kernels", default="", help="those whose names hold this text, such as 'in band'")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pool = RankPool(arguments.gpus, "cuda")
    rows: list[dict[str, Any]] = []
    try:
        for lanes in arguments.lanes:
            shapes = shapes_of(arguments.gpus, lanes, small=lanes == 64)
            shapes = [s for s in shapes if s[1] <= arguments.largest and arguments.kernels in s[0]]
            shapes.sort(key=lambda shape: shape[1])
            if not shapes:
                continue
            rows += pool.run(measure, shapes, lanes, timeout_s=400)[0]
    finally:
        pool.close()
        if arguments.out and rows:
            write_record(arguments.out, rows, harness=__doc__, world_size=arguments.gpus)
    rows.sort(key=lambda row: (row["kernel"], row["bytes"], row["us"]))
    for (kernel, size), group in itertools.groupby(rows, key=lambda row: (row["kernel"], row["bytes"])):
        best = list(group)
        text = "  ".join(
            f"{r['us']:>8} ({r['lanes']}x{r['threads']}/{r['chunk']} of {r['lanes_of_workspace']})" for r in best[:4]
        )
        print(f"{kernel:>19} {size:>9}: {text}  worst {best[-1]['us']}")
    wrong = sum(row["wrong"] for row in rows)
    print(f"{len(rows)} shapes, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
