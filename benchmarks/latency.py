"""Latency of each strategy beside NCCL: 20 calls in a CUDA graph, 15 replays, median / 20, maximum over ranks.

    python benchmarks/latency.py --gpus 4 --out benchmarks/h200/latency_tp4.json

Every result is compared with the rank-ordered reference before it is timed. Sizes are bytes per rank, bf16.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.environment import environment
from llm_allreduce_plugin import AllReduceConfig, TensorParallelCommunicator
from llm_allreduce_plugin.bench.ranks import RankContext, RankPool
from tests.support.reference import assert_same_bits, rank_input, rank_ordered_sum

CALLS, REPLAYS = 20, 15
DTYPE = torch.bfloat16


def time_call(context: RankContext, call: Callable[[], object]) -> float:
    """Microseconds per call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS + 3):
        dist.barrier(group=context.control_group)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return max(context.gather(statistics.median(times[3:])))


def measure(context: RankContext, sizes: list[int], in_band: bool) -> list[dict[str, Any]]:  # noqa: FBT001
    groups = {
        name: TensorParallelCommunicator(
            context.group,
            context.device,
            AllReduceConfig(allreduce_strategy=name, in_band=in_band),
            control_group=context.control_group,
        )
        for name in ("ONESHOT", "TWOSHOT")
    }
    rows = []
    for size in sizes:
        count = size // DTYPE.itemsize
        seed = context.shared_seed()
        row: dict[str, Any] = {"bytes": size}
        mine = rank_input(seed, context.rank, count, DTYPE).to(context.device)
        verify = size <= 1 << 24  # the reference of larger ones takes longer than everything else
        expected = (
            rank_ordered_sum([rank_input(seed, rank, count, DTYPE) for rank in range(context.world_size)])
            if verify
            else None
        )
        for name, group in groups.items():
            output = group.all_reduce(mine)
            if expected is not None:
                assert_same_bits(output, expected, f"{name}, {size} bytes")
            row[name] = round(time_call(context, functools.partial(group.all_reduce, mine)), 2)
            row[f"{name} launch"] = str(group.explain(mine.shape, DTYPE).launch)
        row["NCCL"] = round(time_call(context, functools.partial(dist.all_reduce, mine, group=context.group)), 2)
        row["verified"] = verify
        rows.append(row)
    for group in groups.values():
        group.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--min", type=int, default=12, help="smallest size, as a power of two")
    parser.add_argument("--max", type=int, default=28, help="largest size, as a power of two")
    parser.add_argument("--in-band", action="store_true", help="with the setting in_band")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pool = RankPool(arguments.gpus, "cuda")
    try:
        rows = pool.run(
            measure, [1 << power for power in range(arguments.min, arguments.max + 1)], arguments.in_band, timeout_s=560
        )[0]
    finally:
        pool.close()
    print(f"{'bytes':>10} {'ONESHOT':>9} {'TWOSHOT':>9} {'NCCL':>9}   us, {arguments.gpus} GPUs, bf16, in a graph")
    for row in rows:
        print(f"{row['bytes']:>10} {row['ONESHOT']:>9} {row['TWOSHOT']:>9} {row['NCCL']:>9}")
    if arguments.out:
        record = {"environment": environment(), "harness": __doc__, "world_size": arguments.gpus, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
