"""LOWPRECISION's algorithms against each other, at every size, verified to the bit, then timed in a graph.

    python benchmarks/low_precision_forms.py --gpus 4 --transport host --wire-format tq3 --out forms.json

Microseconds per call, bf16, launched as the policy does. Ranks count as two domains, one half each, whatever the
machine has: where it has one, this says what the hierarchical algorithm costs, not what it is for.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.measure.answers import make_input, wrong_elements
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from llm_allreduce_plugin.measure.timing import time_graph
from tests.support.low_precision import expected_sum

DTYPE = torch.bfloat16
SIZES = tuple(1 << power for power in range(16, 28, 2))  # bytes
LARGEST_VERIFIED = 16 << 20  # the oracles take their time


def forms(world_size: int) -> list[dict[str, Any]]:
    """The settings of each algorithm for so many ranks."""
    found: list[dict[str, Any]] = [{"algorithm": "two_shot"}, {"algorithm": "ring"}]
    if world_size in (4, 6, 8):
        half = world_size // 2
        found.append({"algorithm": "hierarchical", "domains": (0,) * half + (1,) * half})
    return found


def measure(context: RankContext, transport: str, wire: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Collective: one communicator after another, all sizes."""
    rows = []
    for form in forms(context.world_size):
        settings = {"wire_format": wire, "min_bytes": 0, **form}
        group = context.communicator("LOWPRECISION", transport=transport, low_precision=settings)
        for size in sizes:
            count, seed = size // DTYPE.itemsize, context.shared_seed()
            decision = group.explain((count,), DTYPE)
            assert decision.launch is not None
            mine = make_input(seed, context.rank, count, DTYPE, context.device)
            wrong = 0
            if size <= LARGEST_VERIFIED:
                ranks = range(context.world_size)
                inputs = [make_input(seed, rank, count, DTYPE, context.device) for rank in ranks]
                expected = expected_sum(decision.launch, inputs)
                output = group.all_reduce(mine)
                wrong = wrong_elements(output, expected, exact=True, world_size=context.world_size)
            timing = time_graph(context, lambda group=group, mine=mine: group.all_reduce(mine))  # type: ignore[misc]
            row = {"bytes": size, "algorithm": form["algorithm"], "launch": str(decision.launch)}
            rows.append(row | {"us": round(timing.median, 2), "wrong": sum(context.gather(wrong))})
        torch.cuda.synchronize()
        group.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--transport", choices=("peer", "host"), default="peer")
    parser.add_argument("--wire-format", choices=[str(wire) for wire in WireFormat], default="fp8")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pool = RankPool(arguments.gpus, "cuda")
    try:
        rows = pool.run(measure, arguments.transport, arguments.wire_format, SIZES, timeout_s=400)[0]
    finally:
        pool.close()
    by_size = sorted(rows, key=lambda row: row["bytes"])
    for size, group in itertools.groupby(by_size, key=lambda row: row["bytes"]):
        print(f"{size:>10}: " + "  ".join(f"{row['algorithm']} {row['us']}" for row in group))
    wrong = sum(row["wrong"] for row in rows)
    print(f"{len(rows)} rows, {wrong} wrong")
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__, world_size=arguments.gpus)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
