"""What a GPU does between two replays of an engine's graph, of traces of torch's profiler, one of each rank.

    python benchmarks/vllm_decode.py --tp 4 --profile /tmp/traces --profiled-batch 128
    python benchmarks/graph_gaps.py /tmp/traces/default/*.gz --out gaps.json

A decoding step is one replay, and behind it what is not in the graph: logits, the sampled tokens, the next step's
inputs. For each trace: the median time of a replay, of the gap to the next one, and of that gap how long no kernel ran;
then each kernel and copy of the gap, in its order: where it begins behind the replay's end, how long it runs, and how
long nothing ran before it. ``launched``: when the host asked for the next replay, from the end of the one before: where
that is later than what runs in the gap ends, the GPU waits for the host. Microseconds, medians over the steps whose gap
has the most usual sequence.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LAUNCH = "cudaGraphLaunch"
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
NAME_CHARACTERS = 70


@dataclass
class Replay:
    """One replay of a graph, and what ran behind it until the next one. Times in microseconds of the trace."""

    asked: float
    begin: float
    end: float
    behind: list[dict[str, Any]] = field(default_factory=list)


def events_of(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    events: list[dict[str, Any]] = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    return events


def replays_in(events: Sequence[dict[str, Any]]) -> list[Replay]:
    """The replays of a trace, in the order of their start, each with what ran on the GPU behind it until the next."""
    asked = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("name") == LAUNCH and "correlation" in event.get("args", {})
    }
    on_gpu = sorted((event for event in events if event.get("cat") in ON_GPU), key=lambda event: event["ts"])
    replays: dict[int, Replay] = {}
    newest: Replay | None = None
    for event in on_gpu:
        number, end = event["args"].get("correlation"), event["ts"] + event["dur"]
        if number in asked:
            if number not in replays:
                replays[number] = Replay(asked[number], event["ts"], end)
            newest = replays[number]
            newest.end = max(newest.end, end)
        elif newest is not None:
            newest.behind.append(event)
    return sorted(replays.values(), key=lambda replay: replay.begin)


def summary_of(replays: Sequence[Replay]) -> dict[str, Any]:
    """Medians over those steps whose gap has the most usual sequence of kernels and copies.

    Raises:
        ValueError: the trace has no two replays.
    """
    pairs = list(itertools.pairwise(replays))
    if not pairs:
        message = "the trace has no two replays of a graph"
        raise ValueError(message)

    def names(replay: Replay) -> tuple[str, ...]:
        return tuple(event["name"] for event in replay.behind)

    usual, _ = collections.Counter(names(first) for first, _ in pairs).most_common(1)[0]
    steps = [pair for pair in pairs if names(pair[0]) == usual]

    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 1)

    rows, idle_of_steps = [], [0.0] * len(steps)
    for place, name in enumerate(usual):
        begins, takes, waits = [], [], []
        for number, (first, _) in enumerate(steps):
            event = first.behind[place]
            ended = max([first.end, *(before["ts"] + before["dur"] for before in first.behind[:place])])
            begins.append(event["ts"] - first.end)
            takes.append(event["dur"])
            waits.append(max(0.0, event["ts"] - ended))
            idle_of_steps[number] += waits[-1]
        rows.append({"begins": median(begins), "takes": median(takes), "idle_before": median(waits), "name": name})
    last_idle = []
    for number, (first, second) in enumerate(steps):
        ended = max([first.end, *(event["ts"] + event["dur"] for event in first.behind)])
        last_idle.append(max(0.0, second.begin - ended))
        idle_of_steps[number] += last_idle[-1]
    return {
        "steps": len(steps),
        "of": len(pairs),
        "replay_us": median([first.end - first.begin for first, _ in steps]),
        "gap_us": median([second.begin - first.end for first, second in steps]),
        "idle_us": median(idle_of_steps),
        "idle_before_replay_us": median(last_idle),
        "launched_us": median([second.asked - first.end for first, second in steps]),
        "gap": rows,
    }


def main() -> None:
    from llm_allreduce_plugin.measure.environment import write_record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for trace in arguments.traces:
        replays = replays_in(events_of(trace))
        if len(replays) < 2:
            print(f"{trace.name}: no two replays of a graph")
            continue
        row = {"trace": f"{trace.parent.name}/{trace.name}", **summary_of(replays)}
        rows.append(row)
        print(
            f"{row['trace']}: {row['steps']} of {row['of']} steps: replay {row['replay_us']}, gap {row['gap_us']}, of "
            f"which nothing ran for {row['idle_us']}; next replay asked for at {row['launched_us']}, and nothing ran "
            f"for {row['idle_before_replay_us']} before it"
        )
        for item in row["gap"]:
            print(f"{item['begins']:>9} {item['takes']:>8} {item['idle_before']:>8}  {item['name'][:NAME_CHARACTERS]}")
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__)


if __name__ == "__main__":
    main()
