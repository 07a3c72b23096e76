"""The thread that writes a rank's report and counts for Prometheus, where somebody wants that."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import Any

from llm_allreduce_plugin.base.guarded import Guarded
from llm_allreduce_plugin.runtime import reports
from llm_allreduce_plugin.runtime.metrics import RankCounters

logger = logging.getLogger(__name__)

ReportOf = Callable[[], dict[str, Any] | None]


class _Outlet:
    """A place that reports go to, each only if it differs from the one before."""

    def __init__(self, failing: str, works: str, deliver: Callable[[dict[str, Any]], None], retry_s: float) -> None:
        self._deliver = deliver
        self._delivered: dict[str, Any] | None = None
        self._next: dict[str, Any] | None = None
        self._guarded = Guarded(failing, works, self._run, retry_s)

    def _run(self) -> None:
        if self._next is not None and self._next != self._delivered:
            self._deliver(self._next)
            self._delivered = self._next

    def __call__(self, report: dict[str, Any], *, now: bool) -> None:
        self._next = report
        self._guarded(now=now)


class Reporter:
    """A daemon thread, apart from the one that watches for expired waits: a folder may hang, too.

    Args:
        report_dir: where reports are written; None: nowhere.
        counters: that Prometheus adds up; None: there are none.
        report: what the rank has done so far; None once there is nobody left to report on: the thread then ends.
    """

    # What a killed process has done since its last report is lost to the summary, so that is no older than this.
    PERIOD_S = 0.25
    RETRY_S = 2.0
    CLOSE_S = 5.0  # that closing waits for a folder that hangs

    def __init__(self, report_dir: Path | None, counters: RankCounters | None, report: ReportOf) -> None:
        self._report = report
        self._outlets: list[_Outlet] = []
        if report_dir is not None:
            works = f"report_dir={report_dir} is written again"
            self._outlets.append(
                _Outlet(f"report_dir={report_dir} cannot be written", works, _writer(report_dir), self.RETRY_S)
            )
        if counters is not None:
            works = "calls are counted for Prometheus again"
            self._outlets.append(
                _Outlet("calls cannot be counted for Prometheus", works, counters.publish, self.RETRY_S)
            )
        self._stop = threading.Event()
        # A process that ends without closing still says what it did. Runs in the children of multiprocessing too.
        self._at_exit = util.Finalize(None, _last_words, args=(weakref.ref(self),), exitpriority=10)
        self._thread = threading.Thread(target=self._run, name="llm-allreduce-reports", daemon=True)
        self._thread.start()

    @classmethod
    def write_once(cls, report_dir: Path, report: dict[str, Any]) -> None:
        """Write a report that will not change: by a thread that goes on trying until it could be.

        Returns when that has tried once, or after ``CLOSE_S``, if the folder hangs.
        """
        works = f"report_dir={report_dir} is written again"
        failing = f"report_dir={report_dir} cannot be written"
        guarded = Guarded(failing, works, lambda: reports.write(report_dir, report))
        tried = threading.Event()

        def try_until_written() -> None:
            while not guarded():
                tried.set()
                time.sleep(cls.RETRY_S)
            tried.set()

        threading.Thread(target=try_until_written, name="llm-allreduce-reports", daemon=True).start()
        tried.wait(cls.CLOSE_S)

    def close(self) -> None:
        """Let the thread write the last report, and end. Takes at most ``CLOSE_S``, if the folder hangs."""
        self._at_exit.cancel()
        self._stop.set()
        self._thread.join(self.CLOSE_S)

    def _tell(self, *, now: bool = False) -> bool:
        """Report what has changed; False when there is nobody left to report on."""
        report = self._report()
        if report is None:
            return False
        for outlet in self._outlets:
            outlet(report, now=now)
        return True

    def _run(self) -> None:
        over = False

        def tell() -> None:
            nonlocal over
            over = not self._tell()

        guarded = Guarded("reports cannot be made", "reports are made again", tell, self.RETRY_S)
        while not over and not self._stop.wait(self.PERIOD_S):
            guarded()
        if over:
            self._at_exit.cancel()
        else:  # here, too, so that whoever closes waits no longer than it wants to
            Guarded("the last report cannot be made", "", lambda: self._tell(now=True))()


def _writer(folder: Path) -> Callable[[dict[str, Any]], None]:
    """Writes reports into ``folder``; with the first one, old ones go."""
    pruned = False

    def write(report: dict[str, Any]) -> None:
        nonlocal pruned
        reports.write(folder, report)
        if not pruned:
            pruned = True
            try:
                reports.prune(folder)
            except OSError as error:
                logger.debug("report_dir=%s: old reports stay: %s", folder, error)

    return write


def _last_words(this: weakref.ref[Reporter]) -> None:
    if (reporter := this()) is not None:
        reporter.close()
