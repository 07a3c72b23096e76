"""Reports of ranks: whatever lies in the folder, whoever else writes there, and whatever happens to the disk."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_allreduce_plugin.algorithms.facts import LARGEST_WORLD_SIZE
from llm_allreduce_plugin.base.members import new_member
from llm_allreduce_plugin.engines.common.summary import tell
from llm_allreduce_plugin.errors import UnreadableFileError
from llm_allreduce_plugin.runtime import reports
from llm_allreduce_plugin.runtime.metrics import ReportCollector
from tests.support.forks import Forks

pytestmark = pytest.mark.timeout(60)

GOOD: dict[str, Any] = {"rank": 0, "closed": False, "calls": {"ONESHOT": 7}, "captured": {}, "fallback_calls": []}
FALLBACK = {"requested": "ONESHOT", "strategy": "NCCL", "reason": "no kernel", "calls": 2}
DEEP = "[" * 100_000

# Of rank 1, each in the place of a report of its.
POISON: dict[str, Any] = {
    "no object": [],
    "a number": 7,
    "a rank that is text": GOOD | {"rank": "1"},
    "a rank that is a list": GOOD | {"rank": [1]},
    "a rank below 0": GOOD | {"rank": -1},
    "calls that are a list": GOOD | {"rank": 1, "calls": [["ONESHOT", 7]]},
    "calls that are text": GOOD | {"rank": 1, "calls": {"ONESHOT": "7"}},
    "calls that are null": GOOD | {"rank": 1, "calls": None},
    "calls below 0": GOOD | {"rank": 1, "calls": {"ONESHOT": -7}},
    "calls that are a truth value": GOOD | {"rank": 1, "calls": {"ONESHOT": True}},
    "calls beyond 64 bits": GOOD | {"rank": 1, "calls": {"ONESHOT": 1 << 80}},
    "captured that is text": GOOD | {"rank": 1, "captured": "many"},
    "fallbacks that are numbers": GOOD | {"rank": 1, "fallback_calls": [1, 2]},
    "fallbacks that are an object": GOOD | {"rank": 1, "fallback_calls": {"a": 1}},
    "a fallback without a reason": GOOD | {"rank": 1, "fallback_calls": [{"requested": "A", "strategy": "B"}]},
    "a reason that is a list": GOOD | {"rank": 1, "fallback_calls": [FALLBACK | {"reason": ["x"]}]},
    "too many strategies": GOOD | {"rank": 1, "calls": {str(number): 1 for number in range(1000)}},
    "another rank's": GOOD | {"rank": 3},
}
TEXTS: dict[str, bytes] = {
    "half a file": b'{"rank": 1, "calls": {',
    "nothing": b"",
    "deep nesting": DEEP.encode(),
    "nested deeply inside": (json.dumps(GOOD | {"rank": 1})[:-1] + f', "more": {DEEP}').encode(),
    "a number of thousands of digits": b'{"rank": 1, "calls": {"ONESHOT": ' + b"9" * 5000 + b"}}",
    "not a number": b'{"rank": 1, "calls": {"ONESHOT": NaN}}',
    "UTF-16": json.dumps(GOOD | {"rank": 1}).encode("utf-16"),
    "bytes": bytes(range(256)),
    "huge": (json.dumps(GOOD | {"rank": 1}) + " " * (64 << 20)).encode(),
}


def place(folder: Path, name: str) -> None:
    path = folder / "rank-1.json"
    if name in POISON:
        path.write_text(json.dumps(POISON[name]))
    elif name in TEXTS:
        path.write_bytes(TEXTS[name])
    elif name == "a pipe":
        os.mkfifo(path)
    elif name == "a device":
        path.symlink_to("/dev/zero")
    elif name == "a folder":
        path.mkdir()
    else:
        path.symlink_to(path)


SETUP = """
import logging
from pathlib import Path
from prometheus_client import CollectorRegistry, generate_latest
from llm_allreduce_plugin.engines.common.summary import tell
from llm_allreduce_plugin.runtime.metrics import ReportCollector
"""
READ = """
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
folder = Path(os.environ["FOLDER"])
collector = ReportCollector(folder, since=0.0)
registry = CollectorRegistry()
registry.register(collector)
print(generate_latest(registry).decode())
tell(folder, 0.0)
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    pytest.importorskip("prometheus_client")
    forks = Forks(SETUP)
    yield forks
    forks.close()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [*POISON, *TEXTS, "a pipe", "a device", "a folder", "a loop"])
def test_nothing_that_lies_there_breaks_or_hangs_a_reader(tmp_path: Path, name: str, forks: Forks) -> None:
    """The scrape and the summary: in a process of their own, which must end, and soon, with what is good."""
    (tmp_path / "rank-0.json").write_text(json.dumps(GOOD))
    place(tmp_path, name)
    code, said = forks.run(READ, FOLDER=str(tmp_path))
    assert code == 0, said
    samples = [line for line in said.splitlines() if line.startswith("llm_allreduce_calls_total{")]
    assert len(samples) == 1
    assert 'rank="0"' in samples[0]
    assert samples[0].endswith(" 7.0")
    assert "all-reduce summary: ONESHOT 7 calls; no fallbacks (rank 0's last report)" in said


def test_errors_name_the_file_and_the_field(tmp_path: Path) -> None:
    for name, reason in (
        ("calls that are text", r"rank-1\.json is no report: calls.ONESHOT: Input should be a valid integer"),
        ("another rank's", r"rank-1\.json holds the report of another rank or group than its name says"),
        ("no object", r"rank-1\.json is no report: document: "),
    ):
        place(tmp_path, name)
        with pytest.raises(UnreadableFileError, match=reason):
            reports.read(tmp_path / "rank-1.json")


# -- several groups ----------------------------------------------------------------------------------------------------


def groups() -> list[dict[str, Any]]:
    """Reports of what one machine may serve at once, each from a process and a group of its own."""
    return [
        {**reports.Identity(rank, ranks, name, member).fields(), **GOOD, "rank": rank, "calls": {"ONESHOT": calls}}
        for name, ranks, calls in (
            ("dp0", (0, 1), 10),
            ("dp1", (0, 1), 20),  # independent engines number their ranks alike
            ("dp0", (2, 3), 30),  # a later pipeline stage
            ("", (0, 1), 40),  # another server, or another model in the same process
            ("", (0, 2), 50),
        )
        for member in [new_member()]
        for rank in (0, 1)
    ]


def test_no_two_groups_share_a_file_or_a_counter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    caplog.set_level("INFO")
    written = groups()
    collector = ReportCollector(tmp_path, since=0.0)
    registry = prometheus.CollectorRegistry()
    registry.register(collector)
    before: dict[str, float] = {}
    for _ in range(3):  # the counters never fall
        for report in written:
            report["calls"]["ONESHOT"] += 1
            reports.write(tmp_path, report)
            now = {
                str(sorted(sample.labels.items())): sample.value
                for family in registry.collect()
                for sample in family.samples
                if sample.name == "llm_allreduce_calls_total"
            }
            assert all(now[labels] >= value for labels, value in before.items())
            before = now
        assert len(before) == len(written)
    assert sum(before.values()) == 2 * (10 + 20 + 30 + 40 + 50) + 3 * len(written)
    assert len(list(tmp_path.iterdir())) == len(written)
    tell(tmp_path, 0.0)
    assert len(caplog.messages) == 5, "a line for each group"
    for name, ranks, calls in (
        ("dp0", "0-1", 13),
        ("dp1", "0-1", 23),
        ("dp0", "2-3", 33),
        ("", "0-1", 43),
        ("", "0+2", 53),
    ):
        start = f"all-reduce summary of {name + '.' if name else ''}ranks{ranks}."
        assert any(line.startswith(start) and f"ONESHOT {calls} calls;" in line for line in caplog.messages)


def test_the_summary_takes_the_newest_report_of_a_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ranks make the same calls and are killed one after the other: rank 0's last report may be the oldest."""
    caplog.set_level("INFO")
    member = new_member()
    for rank, calls in ((1, 216), (0, 0)):
        fields = reports.Identity(rank, (0, 1), "dp0", member).fields()
        reports.write(tmp_path, {**GOOD, **fields, "calls": {"ONESHOT": calls} if calls else {}})
    tell(tmp_path, 0.0)
    assert caplog.messages == ["all-reduce summary: ONESHOT 216 calls; no fallbacks (rank 1's last report)"]
    caplog.clear()
    reports.write(tmp_path, {**GOOD, **reports.Identity(1, (0, 1), "dp0", member).fields(), "calls": {}})
    tell(tmp_path, 0.0)
    assert caplog.messages == ["all-reduce summary: no calls up to the last report of its ranks"]


def test_other_servers_and_earlier_runs_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> set[str]:
        return {report.group for report in reports.of_this_server(tmp_path, since)}

    since = time.time() - 10
    names = {}
    for server in ("a", "b", ""):
        monkeypatch.setenv(reports.SERVER_VARIABLE, server)
        identity = reports.Identity(0, (0, 1), "dp0", new_member())
        reports.write(tmp_path, GOOD | identity.fields())
        names[server] = identity.group
    monkeypatch.setenv(reports.SERVER_VARIABLE, "a")
    assert shown() == {names["a"], names[""]}
    monkeypatch.setenv(reports.SERVER_VARIABLE, "")
    assert shown() == set(names.values()), "where nobody knows, all that is new"
    os.utime(tmp_path / reports.file_name(0, names["b"]), (since - 1,) * 2)
    assert shown() == {names["a"], names[""]}


def test_restarts_do_not_fill_the_folder(tmp_path: Path) -> None:
    host = new_member().rsplit("-", 3)[0]
    ended = subprocess.Popen(["true"])
    ended.wait()
    old = time.time() - 3600
    for number in range(300):
        path = tmp_path / f"rank-0.dp0.ranks0-1.{host}-{ended.pid}-aaaaaa-{number}.json"
        path.write_text("{}")
        os.utime(path, (old + number,) * 2)
    alive = tmp_path / f"rank-0.dp0.ranks0-1.{new_member()}.json"
    elsewhere = tmp_path / "rank-0.dp0.ranks0-1.otherhost-1-aaaaaa-0.json"
    mine = tmp_path / "rank-notes.json"
    for path in (alive, elsewhere, mine):
        path.write_text("{}")
        os.utime(path, (old - 100,) * 2)
    (tmp_path / "other.txt").write_text("not a report")
    reports.prune(tmp_path)
    left = set(tmp_path.iterdir())
    assert {alive, elsewhere, mine, tmp_path / "other.txt"} <= left
    assert len(left) == 4 + reports.MOST_KEPT
    os.utime(elsewhere, (time.time() - 8 * 24 * 3600,) * 2)
    reports.prune(tmp_path)
    assert not elsewhere.exists()


def test_one_that_cannot_be_removed_keeps_no_other_from_it(tmp_path: Path) -> None:
    names = [f"rank-{number}.json" for number in range(reports.MOST_KEPT + 3)]
    for number, name in enumerate(names):
        path = tmp_path / name
        if number == reports.MOST_KEPT:
            path.mkdir()  # which nobody unlinks
        else:
            path.write_text("{}")
        os.utime(path, (time.time() - 2 * reports.KEPT_S - number,) * 2)
    stuck = tmp_path / names[-3]
    reports.prune(tmp_path)
    assert stuck.exists()
    assert not any((tmp_path / name).exists() for name in names[-2:])


def test_all_ranks_of_the_largest_group_are_kept(tmp_path: Path) -> None:
    """Of a run that has ended and of the one before it."""
    host = new_member().rsplit("-", 3)[0]
    ended = subprocess.Popen(["true"])
    ended.wait()
    old = time.time() - 3600
    runs = []
    for run in range(3):
        names = [
            f"rank-{rank}.dp0.ranks0-71.{host}-{ended.pid}-aaaaaa-{run}.json" for rank in range(LARGEST_WORLD_SIZE)
        ]
        for rank, name in enumerate(names):
            (tmp_path / name).write_text("{}")
            os.utime(tmp_path / name, (old + 100 * run + rank,) * 2)
        runs.append(set(names))
    reports.prune(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == runs[1] | runs[2]


# -- writing -----------------------------------------------------------------------------------------------------------


def test_names_that_others_can_foresee_are_not_followed(tmp_path: Path) -> None:
    """In a folder that others may write to, with a file of the victim's behind every name that could be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "reports"
    folder.mkdir()
    report = GOOD | reports.Identity(0, (0, 1), "dp0", new_member()).fields()
    name = reports.file_name(0, report["group"])
    for planted in (name, f".{name}.{os.getpid()}", "rank-0.json", f".rank-0.json.{os.getpid()}", f".{name}.tmp"):
        (folder / planted).symlink_to(victim)
    reports.write(folder, report)
    assert victim.read_text() == "precious"
    assert not (folder / name).is_symlink()
    assert reports.read(folder / name).calls == {"ONESHOT": 7}
    assert len(list(folder.iterdir())) == 5
