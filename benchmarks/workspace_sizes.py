"""What large messages take with less GPU memory to a communicator, side by side.

    python benchmarks/workspace_sizes.py --gpus 2 --out benchmarks/h100/workspace_sizes_tp2.json

MINLATENCY in graphs, microseconds per call: median of 15 replays of 20 calls, of the slowest rank. All workspaces are
open at once, and each size is measured with all of them in turns, three times; a row has the median of each, that over
the one of the first workspace, and into how many rounds, a launch each, the message falls. Every answer is compared bit
for bit.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin.algorithms.decision import Algorithm, Launch
from llm_allreduce_plugin.measure.answers import make_case, wrong_elements
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from llm_allreduce_plugin.measure.timing import time_graph

MIB = 1 << 20
TURNS = 3


def _rounds(launch: Launch, size: int, ranks: int) -> int:
    parts = 1 if launch.algorithm is Algorithm.ONE_SHOT else ranks
    return -(-size // (launch.chunk_vectors * 16 * parts))


def measure(context: RankContext, workspaces: list[int], sizes: list[int]) -> list[dict[str, Any]]:
    groups = {size: context.communicator("MINLATENCY", workspace_bytes=size * MIB) for size in workspaces}
    rows = []
    for size in sizes:
        mine, expected = make_case(context, size // 2, torch.bfloat16)
        times: dict[int, list[float]] = {workspace: [] for workspace in workspaces}
        wrong, rounds = 0, {}
        for _ in range(TURNS):
            for workspace, group in groups.items():
                launch = group.explain(mine.shape, mine.dtype).launch
                assert launch is not None
                rounds[workspace] = _rounds(launch, size, context.world_size)
                timing = time_graph(context, functools.partial(group.all_reduce, mine))
                assert timing.output is not None
                wrong += wrong_elements(timing.output, expected, exact=True, world_size=context.world_size)
                times[workspace].append(timing.median)
        medians = {workspace: statistics.median(samples) for workspace, samples in times.items()}
        first = medians[workspaces[0]]
        row: dict[str, Any] = {"bytes": size, "wrong": sum(context.gather(wrong))}
        for workspace, median in medians.items():
            row[f"{workspace}MiB"] = {
                "us": round(median, 2), "ratio": round(median / first, 3), "rounds": rounds[workspace]
            }  # fmt: skip
        rows.append(row)
    torch.cuda.synchronize()
    for group in groups.values():
        group.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--workspaces", type=int, nargs="+", default=[384, 256, 192, 128, 96, 64, 48], help="MiB")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 8, 16, 32, 48, 64, 96, 128, 256], help="MiB")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with RankPool(arguments.gpus, "cuda") as pool:
        rows = pool.run(measure, arguments.workspaces, [size * MIB for size in arguments.sizes])[0]
    for row in rows:
        cells = (f"{name} {cell['us']:8} ({cell['ratio']}, {cell['rounds']})" for name, cell in list(row.items())[2:])
        print(f"{row['bytes'] // MIB:4} MiB  wrong {row['wrong']}  ", *cells)
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__, world_size=arguments.gpus)


if __name__ == "__main__":
    main()
