"""Two versions of this package side by side: what every size takes with the one and with the other.

    python benchmarks/two_versions.py --old OLD --new NEW --tp 2 --rounds 3 --out benchmarks/h100/two_versions_tp2.json

``OLD``, ``NEW``: folders that hold a built ``llm_allreduce_plugin/`` each. Both run `bench` of theirs, in turns, on the
same machine, and who is first changes from round to round: the strategies that kernels run (MINLATENCY, LOWPRECISION),
between peers and through host memory; and between peers with residual and norm behind the sum, in one kernel and in
two (`--transports fused`). A row has the median of each over the rounds, in microseconds, and new / old.
With ``--control`` the old one is measured twice a round; ``*_noise`` is the second over the first, so that a reader
sees what a ratio of equal things comes to.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llm_allreduce_plugin.measure.environment import write_record  # noqa: E402

STRATEGIES = ("--with", "MINLATENCY,LOWPRECISION")
SWEEPS = {
    "auto": ("--transport", "auto", *STRATEGIES, "-b", "4K", "-e", "256M", "-f", "2"),
    "host": ("--transport", "host", *STRATEGIES, "-b", "4K", "-e", "256M", "-f", "2", "-n", "5", "-m", "7"),
    "fused": ("--fused", "--with", "fused,then-norm", "-b", "16K", "-e", "64M", "-f", "2"),
}
WORDS = ("eager_us", "graph_us")
Key = tuple[str, str, int]


def bench(folder: Path, transport: str, ranks: int) -> list[dict[str, Any]]:
    """The rows of one run of `bench`."""
    with tempfile.TemporaryDirectory() as temporary:
        record = Path(temporary) / "bench.json"
        main = "import sys; sys.argv[0] = 'llm-allreduce'; from llm_allreduce_plugin.cli import main; main()"
        command = [sys.executable, "-c", main, "bench", "--tp", str(ranks), *SWEEPS[transport], "--json", str(record)]
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
        subprocess.run(command, check=True, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr)  # noqa: S603
        rows: list[dict[str, Any]] = json.loads(record.read_text())["rows"]
    if transport == "fused":  # where one kernel does not pay, it is not run
        rows = [row for row in rows if not row["left_out"]]
    wrong = [row for row in rows if row["left_out"] or row["graph_wrong"] or row["eager_wrong"]]
    if wrong:
        sys.exit(f"{folder}: wrong, or left out: {wrong}")
    return rows


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    times: dict[Key, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    folders = {"old": arguments.old, "new": arguments.new} | ({"control": arguments.old} if arguments.control else {})
    for index in range(arguments.rounds):
        for transport in arguments.transports:
            for version in sorted(folders, reverse=index % 2 == 0):
                for found in bench(folders[version].resolve(), transport, arguments.tp):
                    for word in WORDS:
                        key = (transport, found["candidate"], found["bytes"])
                        times[key][f"{version}_{word}"].append(found[word])
    rows = []
    for (transport, strategy, size), measured in times.items():
        row: dict[str, Any] = {"transport": transport, "strategy": strategy, "bytes": size}
        for word in WORDS:
            old, new = (statistics.median(measured[f"{version}_{word}"]) for version in ("old", "new"))
            row |= {f"old_{word}": old, f"new_{word}": new, word.replace("_us", "_ratio"): round(new / old, 3)}
            if arguments.control:
                control = statistics.median(measured[f"control_{word}"])
                row[word.replace("_us", "_noise")] = round(control / old, 3)
        row["samples"] = dict(measured)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True)
    parser.add_argument("--new", type=Path, default=ROOT)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--control", action="store_true", help="measure the old one twice a round")
    parser.add_argument("--transports", nargs="+", choices=sorted(SWEEPS), default=["auto", "host"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = compare(arguments)
    old_commit = os.environ.get("BENCHMARK_OLD_COMMIT", "")
    write_record(arguments.out, rows, old_commit=old_commit, rounds=arguments.rounds)
    for row in rows:
        numbers = (f"{row[word]:>9}" for word in ("old_graph_us", "new_graph_us", "graph_ratio"))
        eager = (f"{row[word]:>9}" for word in ("old_eager_us", "new_eager_us", "eager_ratio"))
        noise = (f"{row[word]:>9}" for word in ("graph_noise", "eager_noise") if word in row)
        print(f"{row['transport']:5} {row['strategy']:12} {row['bytes']:>10}", *numbers, *eager, *noise)


if __name__ == "__main__":
    main()
