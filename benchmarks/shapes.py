"""Launch shapes: every kernel at every size over blocks, threads and chunks, each verified, then timed in a graph.

    python benchmarks/shapes.py --gpus 4 --out benchmarks/h200/shapes_tp4.json

The thresholds and launch tables of the package come from these. Microseconds per call, bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.environment import environment
from llm_allreduce_plugin import _C
from llm_allreduce_plugin.bench.harness import make_input, rank_ordered_sum, time_graph, wrong_elements
from llm_allreduce_plugin.bench.ranks import RankContext, RankPool
from llm_allreduce_plugin.memory.symmetric import SymmetricMemory

DTYPE = torch.bfloat16
Shape = tuple[str, bool, int, int, int, int]  # algorithm, in band, bytes, lanes, threads, chunk vectors


def in_band_shapes(algorithm: str, parts: int, sizes: list[int], most_lanes: int) -> list[Shape]:
    shapes = []
    for size in sizes:
        pieces = math.ceil(size / 16 / parts)
        seen = set()
        for threads in (32, 64, 128, 256, 512):
            for lanes in (most_lanes // 4, most_lanes // 2, most_lanes):
                used = min(lanes, math.ceil(pieces / threads))
                chunk = math.ceil(pieces / used)
                # Several vectors per thread of a small block leave the GPU idle.
                if (used, threads) in seen or chunk < 32 or (chunk > threads and threads < 256):
                    continue
                seen.add((used, threads))
                shapes.append((algorithm, True, size, used, threads, chunk))
    return shapes


def flagged_shapes(algorithm: str, parts: int, sizes: list[int], multiprocessors: int) -> list[Shape]:
    shapes = []
    for size in sizes:
        pieces = size // 16 // parts
        for blocks, threads in ((1, 512), (2, 256), (4, 128), (2, 512)):
            for chunk in (threads, 2 * threads, 4 * threads, 8 * threads, 16 * threads):
                lanes = blocks * multiprocessors
                if lanes * chunk <= pieces:
                    shapes.append((algorithm, False, size, lanes, threads, chunk))
    return shapes


def measure(context: RankContext, shapes: list[Shape], workspace_bytes: int, lanes: tuple[int, int]) -> list[Any]:
    layout = _C.make_layout(context.world_size, lanes[0], workspace_bytes, lanes[1])
    memory = SymmetricMemory.open(context.group, context.control_group, context.device, layout)
    workspace = _C.Workspace(context.rank, memory.bases, layout, 10.0, context.device.index)
    rows = []
    data: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for algorithm, in_band, size, used, threads, chunk in shapes:
        if not in_band and chunk * 16 > (
            layout.one_shot_chunk_bytes if algorithm == "ONESHOT" else layout.two_shot_chunk_bytes
        ):
            continue
        count = size // DTYPE.itemsize
        if count not in data:
            seed = context.shared_seed()
            data.clear()
            data[count] = (
                make_input(seed, context.rank, count, DTYPE, context.device),
                rank_ordered_sum(seed, context.world_size, count, DTYPE, context.device),
            )
        mine, expected = data[count]
        output = torch.full_like(mine, float("nan"))
        launch = workspace.one_shot if algorithm == "ONESHOT" else workspace.two_shot

        def call() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            launch(mine.data_ptr(), output.data_ptr(), count, 2, used, threads, chunk, in_band, stream)  # noqa: B023

        call()
        torch.cuda.synchronize()
        wrong = wrong_elements(output, expected, exact=True, world_size=context.world_size)
        timing = time_graph(context, call)
        wrong += wrong_elements(output, expected, exact=True, world_size=context.world_size)
        rows.append(
            {
                "algorithm": algorithm,
                "in_band": in_band,
                "bytes": size,
                "lanes": used,
                "threads": threads,
                "chunk_vectors": chunk,
                "us": round(timing.median, 2),
                "fastest_us": round(timing.fastest, 2),
                "wrong": sum(context.gather(wrong)),
            }
        )
    torch.cuda.synchronize()
    del workspace
    memory.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--quick", action="store_true", help="few sizes")
    parser.add_argument("--workspace-gib", type=float, default=6)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    world_size = arguments.gpus
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    most = 2 * multiprocessors
    shapes = []
    small = [1 << power for power in range(12, 21, 2)] + [1 << 19]
    middle = [1 << power for power in range(18, 25, 2)]
    large = [1 << 24, 1 << 26, 1 << 28]
    shapes += in_band_shapes("ONESHOT", 1, small if world_size > 2 else small + middle[2:] + large[1:2], most)
    shapes += in_band_shapes("TWOSHOT", world_size, [1 << 16, *middle, *large[1:2]], most)
    if world_size == 2:
        shapes += flagged_shapes("ONESHOT", 1, large, multiprocessors)
    shapes += flagged_shapes("TWOSHOT", world_size, large, multiprocessors)
    pool = RankPool(world_size, "cuda")
    try:
        rows = pool.run(
            measure, shapes, int(arguments.workspace_gib * (1 << 30)), (4 * multiprocessors, most), timeout_s=500
        )[0]
    finally:
        pool.close()
    best: dict[tuple[str, bool, int], list[dict[str, Any]]] = {}
    for row in rows:
        best.setdefault((row["algorithm"], row["in_band"], row["bytes"]), []).append(row)
    print(f"{world_size} GPUs: best three shapes (lanes x threads, chunk in vectors)")
    for (algorithm, in_band, size), group in best.items():
        group.sort(key=lambda row: row["us"])
        text = "  ".join(f"{r['us']:>8} ({r['lanes']}x{r['threads']}, {r['chunk_vectors']})" for r in group[:3])
        print(f"{algorithm} {'in band' if in_band else 'flagged'} {size:>10}: {text}  worst {group[-1]['us']}")
    wrong = sum(row["wrong"] for row in rows)
    print(f"{len(rows)} shapes, {wrong} wrong elements")
    if arguments.out:
        record = {"environment": environment(), "harness": __doc__, "world_size": world_size, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=None).replace('{"algorithm"', '\n{"algorithm"') + "\n")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
