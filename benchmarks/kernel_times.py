"""Which kernels a trace of torch's profiler holds, and how long they ran.

    python benchmarks/sglang_decode.py --tp 2 --profile /tmp/traces
    python benchmarks/kernel_times.py /tmp/traces/*.gz

For each trace a line of all kernels together (the time from the first one's start to the last one's end, and how much
of it no kernel ran), then a line for each kernel: calls, microseconds in all, median and 90th percentile, name.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME_CHARACTERS = 90


def kernels_in(path: Path) -> list[dict[str, Any]]:
    """The events of kernels of a trace, in the order of their start. ``ts`` and ``dur`` in microseconds."""
    data = path.read_bytes()
    events = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    return sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])


def idle_us(kernels: Iterable[dict[str, Any]]) -> float:
    """Microseconds between the first and the last kernel in which none ran."""
    idle, end = 0.0, None
    for kernel in kernels:
        if end is not None and kernel["ts"] > end:
            idle += kernel["ts"] - end
        end = max(end or 0.0, kernel["ts"] + kernel["dur"])
    return idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--most", type=int, default=14, help="kernels of a trace, those that take most time")
    arguments = parser.parse_args()
    for trace in arguments.traces:
        kernels = kernels_in(trace)
        if not kernels:
            print(f"{trace.name}: no kernels")
            continue
        span = max(kernel["ts"] + kernel["dur"] for kernel in kernels) - kernels[0]["ts"]
        print(f"{trace.name}: {len(kernels)} kernels in {span:.0f} us, none in {idle_us(kernels):.0f} us of it")
        times: dict[str, list[float]] = collections.defaultdict(list)
        for kernel in kernels:
            times[kernel["name"]].append(kernel["dur"])
        for name, found in sorted(times.items(), key=lambda item: -sum(item[1]))[: arguments.most]:
            slow = sorted(found)[len(found) * 9 // 10]
            print(
                f"{len(found):>7} {sum(found):>9.0f} {statistics.median(found):>8.2f} {slow:>8.2f}  "
                f"{name[:NAME_CHARACTERS]}"
            )


if __name__ == "__main__":
    main()
