"""What is done beside the service: each part fails alone, once in the log, and is tried again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_allreduce_plugin import _C, AllReduceConfig
from llm_allreduce_plugin.base.guarded import Guarded
from llm_allreduce_plugin.base.members import new_member
from llm_allreduce_plugin.engines.vllm.communicator import _report_stock
from llm_allreduce_plugin.runtime import reports
from llm_allreduce_plugin.runtime.metrics import RankCounters
from llm_allreduce_plugin.runtime.monitor import Monitor
from llm_allreduce_plugin.runtime.reporter import Reporter
from tests.support.cpu_group import CpuGroup

pytestmark = pytest.mark.timeout(120)


def until(done: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def report_of(calls: int, member: str, rank: int = 0) -> dict[str, Any]:
    identity = reports.Identity(rank, (0, 1), "", member)
    return {**identity.fields(), "closed": False, "calls": {"ONESHOT": calls}, "captured": {}, "fallback_calls": []}


def test_a_failure_is_told_once_until_it_changes_or_it_works_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    results: list[Exception | None] = [OSError("full"), OSError("full"), OSError("gone"), None, None, OSError("full")]

    def run() -> None:
        if (result := results.pop(0)) is not None:
            raise result

    guarded = Guarded("it cannot be written", "it is written again", run)
    assert [guarded() for _ in range(6)] == [False, False, False, True, True, False]
    assert caplog.messages == [
        "it cannot be written: OSError: full; it is tried again",
        "it cannot be written: OSError: gone; it is tried again",
        "it is written again",
        "it cannot be written: OSError: full; it is tried again",
    ]


FULL_DISK = """
import json, logging, resource, signal, sys, time
from pathlib import Path
from llm_allreduce_plugin.base.members import new_member
from llm_allreduce_plugin.runtime import reports
from llm_allreduce_plugin.runtime.monitor import Monitor
from llm_allreduce_plugin.runtime.reporter import Reporter
Reporter.RETRY_S = 0.5
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails as on a full disk
folder, calls = Path(sys.argv[1]), 0
identity = reports.Identity(0, (0, 1), "", new_member())
monitor = Monitor(None, folder, lambda: {**identity.fields(), "closed": False, "calls": {"ONESHOT": calls}})
path = folder / reports.file_name(0, identity.group)

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def written(number):
    end = time.monotonic() + 20
    while not path.exists() or reports.read(path).calls != {"ONESHOT": number}:
        assert time.monotonic() < end, f"{number} is not written"
        time.sleep(0.02)

written(0)
for calls in (1, 2):
    limit(10)
    time.sleep(2 * monitor._reporter.PERIOD_S + monitor._reporter.RETRY_S)
    assert reports.read(path).calls == {"ONESHOT": calls - 1}, "the old one stays whole"
    assert [found.name for found in folder.iterdir()] == [path.name], "no temporary file is left"
    limit(resource.RLIM_INFINITY)
    written(calls)
monitor.close()
"""


def test_a_full_disk_ends_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    run = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    result = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = tmp_path.iterdir()
    told = [line for line in result.stdout.splitlines() if "report_dir" in line]
    full = f"OSError: [Errno 27] File too large: '{path}'"
    failing, works = f"report_dir={tmp_path} cannot be written: {full}; it is tried again", "is written again"
    assert told == [failing, f"report_dir={tmp_path} {works}"] * 2


def test_a_folder_that_comes_back_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(Reporter, "RETRY_S", 0.5)
    folder = tmp_path / "reports"
    folder.write_text("a file in the folder's place")
    member = new_member()
    monitor = Monitor(None, folder, lambda: report_of(3, member))
    until(lambda: any("cannot be written" in line for line in caplog.messages))
    folder.unlink()
    until(lambda: f"report_dir={folder} is written again" in caplog.messages)
    monitor.close()
    (path,) = folder.iterdir()
    assert reports.read(path).calls == {"ONESHOT": 3}


def _expire(group: CpuGroup) -> None:
    """Rank 0 calls, rank 1 does not."""
    import torch

    with pytest.raises(RuntimeError):
        group.all_reduce(_C.ONE_SHOT, [torch.ones(8)] * 2, ranks=[0])


class _Hanging(RankCounters):
    """Counters whose publishing never returns, as writing to a dead file server does not."""

    def __init__(self, over: threading.Event) -> None:
        super().__init__()
        self._over = over

    def publish(self, report: dict[str, Any]) -> None:
        self._over.wait()


@pytest.mark.parametrize("fault", ("the report raises", "the folder is a file", "counting hangs", "counting raises"))
def test_whatever_fails_beside_it_an_expired_wait_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(Reporter, "CLOSE_S", 0.5)
    group, over, member = CpuGroup(2, timeout_s=0.5), threading.Event(), new_member()
    folder = tmp_path / "reports"
    counters: RankCounters | None = None
    if fault == "the folder is a file":
        folder.write_text("")
    elif fault == "counting hangs":
        counters = _Hanging(over)
    elif fault == "counting raises":
        counters = RankCounters()

    def report() -> dict[str, Any]:
        if fault == "the report raises":
            message = "no report today"
            raise ValueError(message)
        made = report_of(3, member)
        return made | {"calls": "many"} if fault == "counting raises" else made

    monitor = Monitor(group.workspaces[0], folder, report, counters)
    time.sleep(4 * Monitor.PERIOD_S)
    _expire(group)
    until(lambda: any("all-reduce failed: rank 0 waited" in line for line in caplog.messages), 5.0)
    started = time.monotonic()
    monitor.close()
    assert time.monotonic() - started < 5.0
    over.set()
    if fault != "counting hangs":
        warned = [line for line in caplog.messages if "tried again" in line]
        assert len(warned) == len(set(warned)) >= 1, "each failure once"


def test_a_communicator_that_is_gone_ends_both_threads(tmp_path: Path) -> None:
    there = True
    member = new_member()
    monitor = Monitor(None, tmp_path, lambda: report_of(1, member) if there else None, alive=lambda: there)
    reporter = monitor._reporter
    assert reporter is not None
    until(lambda: list(tmp_path.iterdir()))
    there = False
    monitor._thread.join(5)
    reporter._thread.join(5)
    assert not monitor._thread.is_alive()
    assert not reporter._thread.is_alive()


def test_nccl_starts_although_the_report_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(Reporter, "RETRY_S", 0.5)
    folder = tmp_path / "reports"
    folder.write_text("a file in the folder's place")
    stock = SimpleNamespace(rank_in_group=0, world_size=2, ranks=[0, 1], cpu_group=None)
    settings = AllReduceConfig(allreduce_strategy="NCCL", report_dir=folder)  # type: ignore[arg-type]
    _report_stock(stock, settings, "allreduce_strategy is NCCL", "dp0")
    assert any(f"report_dir={folder} cannot be written" in line for line in caplog.messages)
    folder.unlink()
    until(lambda: folder.is_dir() and list(folder.glob("rank-0.dp0.ranks0-1.*.json")))
    (path,) = folder.iterdir()
    assert "vLLM's own all-reduce is left in place" in json.loads(path.read_text())["note"]


ENDS = """
import multiprocessing, sys, time
from pathlib import Path
from llm_allreduce_plugin.base.members import new_member
from llm_allreduce_plugin.runtime import reports
from llm_allreduce_plugin.runtime.monitor import Monitor

def work(folder):
    global monitor, calls
    identity = reports.Identity(0, (0, 1), "", new_member())
    calls = 0
    monitor = Monitor(None, Path(folder), lambda: {**identity.fields(), "closed": False, "calls": {"ONESHOT": calls}})
    time.sleep(1)
    calls = 216
    if "raise" in sys.argv[2]:
        raise SystemExit(1)  # as vLLM's workers do on SIGTERM

if __name__ == "__main__":
    if "itself" in sys.argv[2]:
        work(sys.argv[1])
    else:
        method = sys.argv[2].split()[0]
        process = multiprocessing.get_context(method).Process(target=work, args=(sys.argv[1],))
        process.start()
        process.join()
"""


@pytest.mark.parametrize("way", ("itself", "itself raise", "fork", "fork raise"))
def test_a_process_that_ends_without_closing_writes_its_last_report(tmp_path: Path, way: str) -> None:
    """At once, although its last call was made a moment before."""
    folder = tmp_path / "reports"
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    subprocess.run([sys.executable, str(script), str(folder), way], timeout=60, check=False, env={**os.environ})
    (path,) = folder.iterdir()
    assert reports.read(path).calls == {"ONESHOT": 216}


HANGS = """
import os, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from llm_allreduce_plugin import AllReduceConfig
from llm_allreduce_plugin.engines.common import reports as of_engines
from llm_allreduce_plugin.engines.common.summary import tell_at_exit, tell_now
from llm_allreduce_plugin.engines.vllm.communicator import _report_stock
from llm_allreduce_plugin.runtime import metrics, reports
from llm_allreduce_plugin.runtime.monitor import Monitor
from llm_allreduce_plugin.runtime.reporter import Reporter
from tests.unit.test_monitor import report_of

def hang(*_args):
    threading.Event().wait()

reports.replace_text = reports.found_in = hang  # as on a file server that is gone
Reporter.CLOSE_S = reports.READ_S = 0.5
folder = Path("/dead")
began = time.monotonic()
match sys.argv[1]:
    case "the last report":
        monitor = Monitor(None, Path(sys.argv[2]), lambda: report_of(1, "m"))
    case "a report of the engine's own":
        stock = SimpleNamespace(rank_in_group=0, ranks=[0, 1], cpu_group=None)
        settings = AllReduceConfig(allreduce_strategy="NCCL", report_dir=Path(sys.argv[2]))
        _report_stock(stock, settings, "allreduce_strategy is NCCL", "dp0")
    case "the start":
        of_engines.read_reports(folder, lambda: None)
    case "a scrape":
        from prometheus_client import REGISTRY, generate_latest
        assert metrics.show_reports(folder)
        for _ in range(3):
            assert b"python_info" in generate_latest(REGISTRY)
    case "the summary":
        tell_at_exit(folder, lambda: None)
        tell_now()
print(time.monotonic() - began)
"""


@pytest.mark.parametrize(
    "what", ("the last report", "a report of the engine's own", "the start", "a scrape", "the summary")
)
def test_a_folder_that_hangs_holds_nobody(tmp_path: Path, what: str) -> None:
    """Neither a start, nor a scrape, nor the end of a process."""
    if what in ("the start", "a scrape"):
        pytest.importorskip("prometheus_client")
    run = [sys.executable, "-c", HANGS, what, str(tmp_path)]
    result = subprocess.run(run, capture_output=True, text=True, timeout=12, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < (0.3 if what in ("the last report", "the start") else 2.0)


def test_a_killed_process_has_reported_what_it_did_a_moment_before(tmp_path: Path) -> None:
    """It cannot say more once it is killed: so what it did is in the file soon after."""
    calls, member = 0, new_member()
    monitor = Monitor(None, tmp_path, lambda: report_of(calls, member))
    path = tmp_path / reports.file_name(0, report_of(0, member)["group"])
    try:
        until(path.exists)
        for pause in (0.0, 0.1, 0.3, 0.5, 0.7):
            time.sleep(pause)
            calls += 1
            expected = {"ONESHOT": calls}
            until(lambda expected=expected: reports.read(path).calls == expected, 0.25 + 0.25)  # type: ignore[misc]
    finally:
        monitor.close()
