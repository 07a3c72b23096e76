"""An eager call's host time, a group's start and the proofs of `check`, with two versions of this package in turns.

    python benchmarks/eager_and_start.py --old OLD --new NEW --gpus 2 --out benchmarks/h100/eager_and_start_tp2.json

``OLD``, ``NEW``: folders that hold a built ``llm_allreduce_plugin/`` each; who is first changes from round to round. A
row has the median over the rounds. Calls: microseconds on the host, median of 9 batches of 200 calls, of the slowest
rank, beside those of the bare launch. Start: seconds until ranks (processes, torch, NCCL's group) are ready, until the
first communicator of a process is, and until a second one is; and what the new version says of the parts of the first.
`check`: seconds of `llm-allreduce check`, with and without its proofs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "BENCHMARK_PACKAGE"  # names the folder of the version that a run is of
sys.path.insert(0, os.environ.get(PACKAGE, str(ROOT)))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from llm_allreduce_plugin.measure.environment import write_record  # noqa: E402

if TYPE_CHECKING:  # what compares two versions needs none that is built
    from llm_allreduce_plugin.measure.ranks import RankContext

BATCHES, CALLS = 9, 200
SIZES = (4096, 1 << 16, 1 << 18)


def _per_call_us(context: RankContext, call: Callable[[], object]) -> float:
    samples = []
    for batch in range(BATCHES + 5):  # a host core takes a moment to come to speed
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=context.control_group)
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        if batch >= 5:
            samples.append((time.perf_counter() - began) * 1e6 / CALLS)
    return statistics.median(samples)


def calls(context: RankContext, size: int) -> dict[str, float]:
    from llm_allreduce_plugin import _C

    group = context.communicator("MINLATENCY")
    mine = torch.randn(size // 2, device=context.device).bfloat16()
    output = group.all_reduce(mine)
    planned = next(iter(group._plans.values()))  # noqa: SLF001
    assert planned is not None
    plan = planned.counted
    assert isinstance(plan, _C.Plan)
    found = {"all_reduce_us": _per_call_us(context, lambda: group.all_reduce(mine))}
    if context.device.type == "cuda":
        stream = torch.cuda.current_stream().cuda_stream
        addresses = mine.data_ptr(), output.data_ptr()
        bare = []
        for _ in range(BATCHES):
            torch.cuda.synchronize()
            dist.barrier(group=context.control_group)
            bare.append(plan.time_launches(*addresses, stream, CALLS) / 1e3)
        found["bare_launch_us"] = statistics.median(bare)
        torch.cuda.synchronize()
    found["output_us"] = _per_call_us(context, lambda: torch.empty_like(mine))
    group.close()
    slowest = {name: max(context.gather(value)) for name, value in found.items()}
    if "bare_launch_us" in slowest:
        slowest["over_the_launch_us"] = slowest["all_reduce_us"] - slowest["bare_launch_us"]
    return slowest


def start(context: RankContext) -> dict[str, Any]:
    from llm_allreduce_plugin.runtime import communicator as runtime

    parts: list[dict[str, float]] = []
    if hasattr(runtime, "log_times"):  # says it on the first rank alone
        runtime.log_times = lambda times: parts.append(times.parts_s)
    seconds = []
    for _ in range(2):
        dist.barrier(group=context.control_group)
        began = time.perf_counter()
        group = context.communicator("AUTO")
        seconds.append(time.perf_counter() - began)
        group.close()
    first, second = (max(context.gather(value)) for value in seconds)
    return {"first_s": first, "second_s": second, "parts_s": parts[0] if parts else {}}


def check(*options: str) -> float:
    main = "import sys; sys.argv[0] = 'llm-allreduce'; from llm_allreduce_plugin.cli import main; main()"
    folder = os.environ.get(PACKAGE, str(ROOT))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", main, "check", *options]
    began = time.perf_counter()
    ran = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    seconds = time.perf_counter() - began
    told = [line for line in ran.stdout.splitlines() if "summed" in line or "FAIL" in line]
    sys.stderr.write("".join(f"{line}\n" for line in told))
    if not options and not any("summed" in line for line in told):
        sys.exit(f"{folder}: check has proved nothing:\n{ran.stdout}")
    return seconds


def one(gpus: int) -> dict[str, Any]:
    """What a version takes for everything."""
    from llm_allreduce_plugin.measure.ranks import RankPool

    began = time.perf_counter()
    with RankPool(gpus or 2, "cuda" if gpus else "cpu") as pool:
        found: dict[str, Any] = {"ranks_s": time.perf_counter() - began, "start": pool.run(start)[0]}
        found["calls"] = {str(size): pool.run(calls, size)[0] for size in SIZES}
    return found | {"check_s": check(), "check_without_proofs_s": check("--no-proof")}


def _flat(found: Any, name: str = "") -> dict[str, float]:  # noqa: ANN401
    if not isinstance(found, dict):
        return {name: float(found)}
    return {
        key: value for part, inner in found.items() for key, value in _flat(inner, f"{name} {part}".strip()).items()
    }


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    folders = {"old": arguments.old, "new": arguments.new}
    found: dict[str, list[dict[str, float]]] = {version: [] for version in folders}
    for turn in range(arguments.rounds):
        for version in sorted(folders, reverse=turn % 2 == 0):
            environment = {**os.environ, PACKAGE: str(folders[version].resolve())}
            command = [sys.executable, str(Path(__file__).resolve()), "--one", "--gpus", str(arguments.gpus)]
            ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)  # noqa: S603
            found[version].append(_flat(json.loads(ran.stdout.splitlines()[-1])))
    names = dict.fromkeys(name for runs in found.values() for run in runs for name in run)
    rows = []
    for name in names:
        samples = {version: [run[name] for run in runs if name in run] for version, runs in found.items()}
        medians = {version: round(statistics.median(values), 3) for version, values in samples.items() if values}
        rows.append({"what": name, **medians, "samples": samples})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, default=ROOT)
    parser.add_argument("--new", type=Path, default=ROOT)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="0: two CPU ranks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="measure one version, for another process")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.gpus)))
        return
    rows = compare(arguments)
    for row in rows:
        print(f"{row['what']:45} old {row.get('old', '-'):>9} new {row.get('new', '-'):>9}")
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__, rounds=arguments.rounds,
                     old_commit=os.environ.get("BENCHMARK_OLD_COMMIT", ""))  # fmt: skip


if __name__ == "__main__":
    main()
