"""Multicast on a node with NVSwitch: whether it opens, whether bits are right, and times beside pushing and NCCL.

    python benchmarks/multicast.py --gpus 8 --out build/multicast.json

scripts/validate_multicast.sh calls it. It refuses where multicast is switched off. What does not open is told with the
reason: a driver that refuses the copies of the proof says nothing of stores of kernels, other than bytes that were
stored and did not arrive. Microseconds per call, bf16, in CUDA graphs. Sums in the switch may be off by what rounding
may cost in another order, and once more: how the switch rounds differs per generation, and is not documented. They must
be the same on all ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin.measure.answers import digest, make_case, wrong_elements
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import FAILURES, RankContext, RankPool, in_a_line
from llm_allreduce_plugin.measure.timing import time_graph
from llm_allreduce_plugin.transport.multicast_driver import switched_off_by

DTYPE = torch.bfloat16
COUNTS = (1, 7, 8, 1023, 4096, 12_345, 1 << 20, (1 << 20) + 1, 1 << 24)
# What is compared: strategy, and settings.
SUBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ONESHOT": ("ONESHOT", {}),
    "ONESHOT (multicast)": ("ONESHOT", {"multicast": "on"}),
    "TWOSHOT": ("TWOSHOT", {}),
    "TWOSHOT (multicast)": ("TWOSHOT", {"multicast": "on"}),
    "TWOSHOT (in switch)": ("TWOSHOT", {"multicast": "on", "in_switch_sum": True}),
}
ONE_SHOT_MOST = 1 << 23  # bytes


def validate(context: RankContext, name: str, sizes: list[int]) -> dict[str, Any]:
    """One subject: why it has no multicast, if so; wrong elements over all counts; a time for each size."""
    strategy, settings = SUBJECTS[name]
    in_switch = bool(settings.get("in_switch_sum"))
    group = context.communicator(strategy, **settings)
    try:
        if settings and not group.facts.multicast.results:
            return {"refused": group.facts.no_multicast_reason}
        counted = group.explain((1 << 16,), DTYPE).counted_as
        if settings and counted != name:
            return {"refused": f"runs as {counted}"}
        wrong = 0
        for count in COUNTS:
            for _ in range(4):  # through every generation
                mine, expected = make_case(context, count, DTYPE)
                output = group.all_reduce(mine)
                wrong += _wrong(context, output, expected, in_switch=in_switch)
        times = {}
        for size in sizes:
            if strategy == "ONESHOT" and size > ONE_SHOT_MOST:
                continue
            mine, expected = make_case(context, size // DTYPE.itemsize, DTYPE)
            timing = time_graph(context, lambda mine=mine: group.all_reduce(mine))  # type: ignore[misc]
            assert timing.output is not None
            wrong += _wrong(context, timing.output, expected, in_switch=in_switch)
            times[size] = round(timing.median, 2)
        return {"wrong": sum(context.gather(wrong)), "us": times}
    finally:
        group.close()


def _wrong(context: RankContext, output: torch.Tensor, expected: torch.Tensor, *, in_switch: bool) -> int:
    """Elements that are not what they must be; one more where sums in the switch differ between ranks."""
    # A switch is asked for fp32 at least. How it adds and rounds nobody has documented, so it may round once more.
    rounded = context.world_size + int(in_switch)
    wrong = wrong_elements(output, expected, exact=not in_switch, world_size=rounded)
    return wrong + int(in_switch and len(set(context.gather(digest(output)))) > 1)


def time_nccl(context: RankContext, sizes: list[int]) -> dict[int, float]:
    """NCCL as this machine has it set up, multicast included."""
    times = {}
    for size in sizes:
        mine, _ = make_case(context, size // DTYPE.itemsize, DTYPE)
        buffer = mine.clone()
        timing = time_graph(context, lambda buffer=buffer: dist.all_reduce(buffer, group=context.group))  # type: ignore[misc]
        times[size] = round(timing.median, 2)
    return times


def table(found: dict[str, dict[str, Any]], sizes: list[int]) -> str:
    """Sizes down, subjects across."""
    lines = ["| bytes | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for size in sizes:
        cells = [str(each.get("us", {}).get(size, "")) for each in found.values()]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    if (switch := switched_off_by()) is not None:
        sys.exit(f"refused: multicast is switched off by {switch}; nothing was asked of the driver")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--min", type=int, default=12, help="smallest size, as a power of two")
    parser.add_argument("--max", type=int, default=28, help="largest size, as a power of two")
    parser.add_argument("--out", type=Path, help="where the record goes, as JSON")
    arguments = parser.parse_args()
    sizes = [1 << power for power in range(arguments.min, arguments.max + 1, 2)]
    found: dict[str, dict[str, Any]] = {}
    try:
        with RankPool(arguments.gpus, "cuda") as pool:
            for name in SUBJECTS:
                found[name] = {"refused": "did not come to an end"}
                found[name] = pool.run(validate, name, sizes, timeout_s=900)[0]
                print(f"{name}: {found[name].get('refused') or str(found[name]['wrong']) + ' wrong'}", flush=True)
            found["NCCL"] = {"wrong": 0, "us": pool.run(time_nccl, sizes, timeout_s=900)[0]}
    except FAILURES as error:  # what has been found so far is told and kept
        print(f"error: {in_a_line(error)}", file=sys.stderr, flush=True)
        found.setdefault("NCCL", {"refused": "not measured"})
    print(table(found, sizes))
    if arguments.out is not None:
        rows = [{"subject": name} | each for name, each in found.items()]
        write_record(arguments.out, rows, harness=__doc__, world_size=arguments.gpus, dtype="bfloat16")
    faults = [name for name, each in found.items() if "refused" in each or each["wrong"]]
    if faults:
        sys.exit(f"FAILED: {', '.join(faults)}")


if __name__ == "__main__":
    main()
