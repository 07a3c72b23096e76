"""AUTO beside the exact strategies it chooses among and NCCL, at every power of two, in CUDA graphs and eager.

    python benchmarks/auto.py --gpus 4 --out benchmarks/h200/auto_tp4.json
    python benchmarks/auto.py --gpus 4 --transport host --out benchmarks/h200/auto_host_tp4.json

Every answer is verified before it is timed. Candidates are timed in turns, forwards and backwards: microseconds per
call, median of a round, maximum over ranks, median over rounds (of eager calls the least). ``ratio`` is AUTO's time
over the fastest one's. AUTO runs the very call of one of the others, so that a ratio above 1 is either a wrong choice
or noise: ``chosen_ratio`` is the time of the strategy that AUTO chose, measured under its own name, over the fastest.
Sizes above ``--limit`` are measured again with three times the rounds; both measurements are in the record
(``again``), and the second one counts.

NCCL through host memory needs ``NCCL_P2P_DISABLE=1``; without, it is left out there.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin.bench import compare, worker
from llm_allreduce_plugin.bench.candidates import OurSettings
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from llm_allreduce_plugin.selection.policy import decide, table_of

OURS = ("AUTO", "ONESHOT", "TWOSHOT")
KINDS = ("graph", "eager")


def choices(context: RankContext, settings: OurSettings, counts: list[int], dtype: str) -> tuple[str, list[Any]]:
    """Where AUTO's table comes from, and its choice at each size, in graphs and eager."""
    group = context.communicator("AUTO", transport=settings.transport, tuning_profile=settings.tuning_profile)
    chosen = [dict.fromkeys(KINDS, str(decide(group.config, group.facts, count, dtype).strategy)) for count in counts]
    source = table_of(group.config, group.facts).source
    group.close()
    return source, chosen


def row_of(found: compare.Comparison, chosen: dict[str, str], *, again: bool) -> dict[str, Any]:
    """One size, judged."""
    row: dict[str, Any] = {"bytes": found.bytes, "again": again, "wrong": sum(found.wrong.values())}
    for kind, times, noise in (
        ("graph", found.graph_us, found.graph_noise),
        ("eager", found.eager_us, found.eager_noise),
    ):
        if not times:
            continue
        fastest = min(times, key=lambda name: times[name])
        row[kind] = {
            "us": times,
            "chosen": chosen[kind],
            "fastest": fastest,
            "ratio": round(times["AUTO"] / times[fastest], 4),
            "chosen_ratio": round(times.get(chosen[kind], times["AUTO"]) / times[fastest], 4),
            "noise": noise,
        }
    return row


def worst(rows: list[dict[str, Any]], kind: str, key: str) -> tuple[float, int]:
    """The largest ratio and its size, of the measurements that count."""
    last = {row["bytes"]: row for row in rows if kind in row}
    return max(((row[kind][key], size) for size, row in last.items()), default=(0.0, 0))


def line_of(row: dict[str, Any]) -> str:
    """For people."""
    cells = []
    for kind in KINDS:
        if kind in row:
            part = row[kind]
            text = f"{kind}: {part['us']['AUTO']:>9.2f} {part['chosen']:>8}, fastest {part['fastest']:>8}"
            cells.append(f"{text} {part['ratio']:.3f}")
    return f"{row['bytes']:>10} {'again' if row['again'] else '     '} {'   '.join(cells)} wrong {row['wrong']}"


def measure(
    pool: RankPool, names: tuple[str, ...], sizes: list[int], chosen: list[Any], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """All sizes, those above the limit twice."""
    rows = []
    element = getattr(torch, arguments.dtype).itemsize
    for size, at_size in zip(sizes, chosen, strict=True):
        calls = max(4, min(20, 20 * (4 << 20) // size))
        for again in (False, True):
            effort = compare.Effort(calls=calls, rounds=arguments.rounds * (3 if again else 1))
            found = pool.run(
                compare.compare, pool.world_size, names, size // element, arguments.dtype, effort, timeout_s=500
            )[0]
            row = row_of(found, at_size, again=again)
            rows.append(row)
            print(line_of(row), flush=True)
            if all(row[kind]["ratio"] <= arguments.limit for kind in KINDS if kind in row):
                break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--cpu", action="store_true", help="CPU ranks, to try this script")
    parser.add_argument("--transport", default="auto", choices=("auto", "peer", "host"))
    parser.add_argument("--profile", help="as the setting tuning_profile: a file, or none; default: what AUTO finds")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--min", type=int, default=10, help="smallest size, as a power of two")
    parser.add_argument("--max", type=int, default=28, help="largest size, as a power of two")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=float, default=1.03, help="AUTO's time over the fastest one's")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = [1 << power for power in range(arguments.min, arguments.max + 1)]
    element = getattr(torch, arguments.dtype).itemsize
    settings = OurSettings(transport=arguments.transport, tuning_profile=arguments.profile)
    world_size = arguments.gpus or 2
    fair = arguments.transport != "host" or os.environ.get("NCCL_P2P_DISABLE") == "1"
    wanted = [*OURS, *(["gloo" if arguments.cpu else "NCCL"] if fair else [])]
    pool = RankPool(world_size, "cpu" if arguments.cpu else "cuda")
    try:
        pool.run(compare.form_groups, (world_size,))
        source, chosen = pool.run(choices, settings, [size // element for size in sizes], arguments.dtype)[0]
        print(f"{world_size} ranks; AUTO goes by {source}")
        refused = pool.run(worker.open_all, tuple(wanted), settings)[0]
        for name, reason in refused.items():
            print(f"{name} is left out: {reason}")
        if "AUTO" in refused:
            sys.exit(1)
        rows = measure(pool, tuple(name for name in wanted if name not in refused), sizes, chosen, arguments)
        pool.run(worker.close_all)
    finally:
        pool.close()
    summary = {
        kind: dict(zip(("worst_ratio", "at_bytes"), worst(rows, kind, "ratio"), strict=True))
        | {"worst_chosen_ratio": worst(rows, kind, "chosen_ratio")[0]}
        for kind in KINDS
        if any(kind in row for row in rows)
    }
    wrong = sum(row["wrong"] for row in rows)
    print(f"worst: {summary}; {wrong} wrong elements")
    if arguments.out:
        options = {"transport": arguments.transport, "dtype": arguments.dtype, "rounds": arguments.rounds}
        write_record(
            arguments.out, rows, harness=__doc__, world_size=world_size, options=options, table=source, worst=summary
        )
    sys.exit(wrong > 0 or any(found["worst_ratio"] > arguments.limit for found in summary.values()))


if __name__ == "__main__":
    main()
