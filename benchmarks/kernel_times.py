"""Which kernels a trace of torch's profiler holds, and how long they ran.

    python benchmarks/sglang_decode.py --tp 2 --profile /tmp/traces
    python benchmarks/kernel_times.py /tmp/traces/*.gz --out benchmarks/h100/sglang_kernel_times_tp2.json

For each trace a line of all kernels together (the time from the first one's start to the last one's end, and how much
of it no kernel ran), then a line for each kernel: calls, microseconds in all, median and 90th percentile, name.
``--out``: the same as a record, in which a trace is named as its folder and its file are. ``--graphs``: only kernels of
CUDA graphs, which is decode without prefill; times between graphs then count as times in which no kernel ran.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import itertools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME_CHARACTERS = 90


def replays_in(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The kernels of each graph that a trace of torch's profiler holds, in the order of the graphs."""
    launches = [event for event in events if event.get("name") == "cudaGraphLaunch"]
    kernels: dict[int, list[dict[str, Any]]] = {event["args"]["correlation"]: [] for event in launches}
    for event in events:
        if event.get("cat") == "kernel" and event["args"]["correlation"] in kernels:
            kernels[event["args"]["correlation"]].append(event)
    ordered = sorted(launches, key=lambda event: event["ts"])
    return [sorted(kernels[event["args"]["correlation"]], key=lambda kernel: kernel["ts"]) for event in ordered]


def kernels_in(path: Path, *, graphs: bool = False) -> list[dict[str, Any]]:
    """The events of kernels of a trace, in the order of their start. ``ts`` and ``dur`` in microseconds.

    ``graphs``: only those that the launch of a CUDA graph started.
    """
    data = path.read_bytes()
    events = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    if graphs:
        kernels = list(itertools.chain.from_iterable(replays_in(events)))
    else:
        kernels = [event for event in events if event.get("cat") == "kernel"]
    return sorted(kernels, key=lambda event: event["ts"])


def idle_us(kernels: Iterable[dict[str, Any]]) -> float:
    """Microseconds between the first and the last kernel in which none ran."""
    idle, end = 0.0, None
    for kernel in kernels:
        if end is not None and kernel["ts"] > end:
            idle += kernel["ts"] - end
        end = max(end or 0.0, kernel["ts"] + kernel["dur"])
    return idle


def rows_of(trace: Path, most: int, *, graphs: bool = False) -> list[dict[str, Any]]:
    """What is recorded of a trace: all kernels together, and those that took most time, the first one most of all."""
    kernels = kernels_in(trace, graphs=graphs)
    named = f"{trace.parent.name}/{trace.name.split('.')[0]}"
    if not kernels:
        return [{"trace": named, "kernels": 0}]
    span = max(kernel["ts"] + kernel["dur"] for kernel in kernels) - kernels[0]["ts"]
    rows: list[dict[str, Any]] = [
        {"trace": named, "kernels": len(kernels), "span_us": round(span), "idle_us": round(idle_us(kernels))}
    ]
    times: dict[str, list[float]] = collections.defaultdict(list)
    for kernel in kernels:
        times[kernel["name"]].append(kernel["dur"])
    for name, found in sorted(times.items(), key=lambda item: -sum(item[1]))[:most]:
        rows.append(
            {
                "trace": named,
                "kernel": name,
                "calls": len(found),
                "all_us": round(sum(found)),
                "median_us": round(statistics.median(found), 2),
                "slow_us": round(sorted(found)[len(found) * 9 // 10], 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--most", type=int, default=14, help="kernels of a trace, those that take most time")
    parser.add_argument("--graphs", action="store_true", help="only kernels of CUDA graphs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [row for trace in arguments.traces for row in rows_of(trace, arguments.most, graphs=arguments.graphs)]
    for row in rows:
        if "kernel" in row:
            times = f"{row['calls']:>7} {row['all_us']:>9} {row['median_us']:>8.2f} {row['slow_us']:>8.2f}"
            print(f"{times}  {row['kernel'][:NAME_CHARACTERS]}")
        elif row["kernels"]:
            print(f"{row['trace']}: {row['kernels']} kernels in {row['span_us']} us, none in {row['idle_us']} us of it")
        else:
            print(f"{row['trace']}: no kernels")
    if arguments.out:
        from llm_allreduce_plugin.measure.environment import write_record

        write_record(arguments.out, rows, harness=__doc__)


if __name__ == "__main__":
    main()
