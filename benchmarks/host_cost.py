"""Host time of an eager call through the communicator, beside that of the bare kernel launch inside it.

    python benchmarks/host_cost.py --gpus 4 --out benchmarks/h200/host_cost.json

Microseconds per call: median of 9 batches of 200 calls, the slowest rank's. A batch is short enough for the launch
queue, so that the host never waits for the GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool

BATCHES, CALLS = 9, 200


def measure(context: RankContext, strategy: str, size: int) -> dict[str, Any]:
    group = context.communicator(strategy)
    mine = torch.randn(size // 2, device=context.device).bfloat16()
    output = group.all_reduce(mine)
    planned = next(iter(group._plans.values()))  # noqa: SLF001
    assert planned is not None
    plan = planned.counted
    assert isinstance(plan, _C.Plan)
    stream = torch.cuda.current_stream().cuda_stream
    for _ in range(5 * CALLS):  # a host core takes a moment to come to speed
        group.all_reduce(mine)
    whole, bare, allocation = [], [], []
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        dist.barrier(group=context.control_group)
        start = time.perf_counter()
        for _ in range(CALLS):
            group.all_reduce(mine)
        whole.append((time.perf_counter() - start) * 1e6 / CALLS)
        torch.cuda.synchronize()
        dist.barrier(group=context.control_group)
        bare.append(plan.time_launches(mine.data_ptr(), output.data_ptr(), stream, CALLS) / 1e3)
        start = time.perf_counter()
        for _ in range(CALLS):
            torch.empty_like(mine)
        allocation.append((time.perf_counter() - start) * 1e6 / CALLS)
    torch.cuda.synchronize()
    group.close()
    slowest = [max(context.gather(statistics.median(samples))) for samples in (whole, bare, allocation)]
    names = ("all_reduce_us", "bare_launch_us", "output_allocation_us")
    row = dict(zip(names, (round(value, 2) for value in slowest), strict=True))
    return {"strategy": strategy, "bytes": size, **row, "over_the_launch_us": round(slowest[0] - slowest[1], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pool = RankPool(arguments.gpus, "cuda")
    try:
        rows = [pool.run(measure, name, size)[0] for name in ("MINLATENCY",) for size in (4096, 1 << 16, 1 << 18)]
    finally:
        pool.close()
    for row in rows:
        print(row)
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__, world_size=arguments.gpus)


if __name__ == "__main__":
    main()
