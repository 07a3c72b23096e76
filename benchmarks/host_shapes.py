"""Launch shapes through host memory: every kernel at every size over blocks and threads, each verified, then timed.

    python benchmarks/host_shapes.py --gpus 4 --out benchmarks/h200/host_shapes_tp4.json

What a node without peer access gets. The tables of the package for host memory come from these. Microseconds per call
in a CUDA graph, bf16. ``lanes_of_workspace``: more of them leave each a smaller slot.
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
from llm_allreduce_plugin.bench.environment import write_record
from llm_allreduce_plugin.bench.harness import (
    make_input,
    rank_ordered_sum,
    relative_error,
    time_graph,
    wrong_elements,
)
from llm_allreduce_plugin.bench.ranks import RankContext, RankPool
from llm_allreduce_plugin.communicator import DEFAULT_HOST_WORKSPACE_BYTES, DTYPE_CODES, HOST_IN_BAND_SHARE
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.memory.host import HostMemory
from llm_allreduce_plugin.wire import PACKETS

DTYPE = torch.bfloat16
KIB, MIB = 1 << 10, 1 << 20
WIRE = {"fp8": WireFormat.FP8, "tq3": WireFormat.TQ3, "hadamard2": WireFormat.HADAMARD2}
MOST_ERROR = {"fp8": 0.05, "tq3": 1.0, "hadamard2": 0.5}

# kernel, bytes, lanes, threads
Shape = tuple[str, int, int, int]


def shapes_of(world_size: int, lanes: int, *, small: bool) -> list[Shape]:
    """What is worth trying with so many lanes."""
    shapes: list[Shape] = []
    if small:
        sizes = (4 * KIB, 16 * KIB, 64 * KIB, 128 * KIB, 256 * KIB)
        for size, threads in itertools.product(sizes, (64, 128, 256, 512)):
            used = math.ceil(size / 16 / threads)
            if used <= lanes:
                shapes.append(("ONESHOT in band", size, used, threads))
    blocks = [count for count in (8, 16, 32, 64, 128) if count <= lanes and (count * 2 >= lanes or small)]
    one_shot = [64 * KIB, 256 * KIB, MIB, 4 * MIB]
    one_shot += [16 * MIB, 64 * MIB] if world_size == 2 else []
    shapes += [("ONESHOT flagged", size, used, 256) for size, used in itertools.product(one_shot, blocks)]
    for size, used in itertools.product((64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB), blocks):
        if world_size > 2:
            shapes.append(("TWOSHOT flagged", size, used, 256))
        shapes += [(wire, size, used, 256) for wire in ("fp8", "tq3") if size >= 256 * KIB]
    return shapes


def plan_of(workspace: _C.Workspace, layout: _C.Layout, shape: Shape) -> _C.Plan:
    """The call that a shape stands for."""
    kernel, size, lanes, threads = shape
    count, vectors, code = size // DTYPE.itemsize, math.ceil(size / 16), DTYPE_CODES[DTYPE]
    if kernel == "ONESHOT in band":
        return _C.Plan(workspace, _C.ONE_SHOT, count, code, lanes, threads, vectors, in_band=True)
    if kernel == "ONESHOT flagged":
        chunk = min(layout.flagged.one_shot_bytes // 16, math.ceil(vectors / lanes))
        return _C.Plan(workspace, _C.ONE_SHOT, count, code, lanes, threads, chunk, in_band=False)
    if kernel == "TWOSHOT flagged":
        chunk = min(layout.flagged.two_shot_bytes // 16, math.ceil(vectors / layout.world_size / lanes))
        return _C.Plan(workspace, _C.TWO_SHOT, count, code, lanes, threads, chunk, in_band=False)
    packet = PACKETS[WIRE[kernel]]
    packets = math.ceil(count / packet.values / layout.world_size)
    chunk = min(layout.flagged.two_shot_bytes // packet.bytes, math.ceil(packets / lanes))
    chunk_vectors = chunk * packet.bytes // 16
    return _C.Plan(
        workspace, _C.LOW_PRECISION, count, code, lanes, threads, chunk_vectors, in_band=False, wire_format=packet.code
    )


def measure(context: RankContext, shapes: list[Shape], lanes: int) -> list[dict[str, Any]]:
    """Collective: one workspace, all shapes."""
    size = DEFAULT_HOST_WORKSPACE_BYTES // context.world_size
    in_band = size // HOST_IN_BAND_SHARE
    layout = _C.make_layout(
        context.world_size, lanes, in_band_bytes=in_band, flagged_bytes=size - in_band, published=True
    )
    memory = HostMemory.open(context.control_group, context.device, layout)
    workspace = _C.Workspace(context.rank, memory.bases, layout, 10.0, context.device.index, memory.local)
    rows = []
    data: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for shape in shapes:
        kernel, payload, used, threads = shape
        count = payload // DTYPE.itemsize
        if count not in data:
            seed = context.shared_seed()
            data.clear()
            data[count] = (
                make_input(seed, context.rank, count, DTYPE, context.device),
                rank_ordered_sum(seed, context.world_size, count, DTYPE, context.device),
            )
        mine, expected = data[count]
        output = torch.full_like(mine, float("nan"))
        plan = plan_of(workspace, layout, shape)

        def call() -> None:
            plan(mine.data_ptr(), output.data_ptr(), torch.cuda.current_stream().cuda_stream)  # noqa: B023

        timing = time_graph(context, call)
        if kernel in WIRE:
            wrong = int(relative_error(output, expected) > MOST_ERROR[kernel])
        else:
            wrong = wrong_elements(output, expected, exact=True, world_size=context.world_size)
        row = {"kernel": kernel, "bytes": payload, "lanes": used, "threads": threads, "lanes_of_workspace": lanes}
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
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pool = RankPool(arguments.gpus, "cuda")
    rows: list[dict[str, Any]] = []
    try:
        for lanes in arguments.lanes:
            shapes = shapes_of(arguments.gpus, lanes, small=lanes == 64)
            shapes.sort(key=lambda shape: shape[1])
            rows += pool.run(measure, shapes, lanes, timeout_s=400)[0]
    finally:
        pool.close()
        if arguments.out and rows:
            write_record(arguments.out, rows, harness=__doc__, world_size=arguments.gpus)
    rows.sort(key=lambda row: (row["kernel"], row["bytes"], row["us"]))
    for (kernel, size), group in itertools.groupby(rows, key=lambda row: (row["kernel"], row["bytes"])):
        best = list(group)
        text = "  ".join(f"{r['us']:>8} ({r['lanes']}x{r['threads']} of {r['lanes_of_workspace']})" for r in best[:4])
        print(f"{kernel:>16} {size:>9}: {text}  worst {best[-1]['us']}")
    wrong = sum(row["wrong"] for row in rows)
    print(f"{len(rows)} shapes, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
