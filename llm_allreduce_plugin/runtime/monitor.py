"""Keeps watch beside the calls: says when a wait has expired, and has the rank's reports written."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.guarded import Guarded
from llm_allreduce_plugin.errors import AllReduceError
from llm_allreduce_plugin.group.board import Board
from llm_allreduce_plugin.runtime.failures import error_of
from llm_allreduce_plugin.runtime.metrics import RankCounters
from llm_allreduce_plugin.runtime.reporter import Reporter

logger = logging.getLogger(__name__)


class Monitor:
    """A daemon thread per communicator, and a second one where reports are wanted.

    A GPU wait may expire inside a replayed graph, far from any Python call: the device then stops with a CUDA error
    that names nothing. This thread reads the record that the kernel left and puts the named error into the log.
    Whatever else is done beside the service cannot end it.

    Args:
        workspace: that is watched; None: nothing is.
        report_dir: where reports go; None: nowhere.
        report: what the rank has done so far; None once its communicator is gone.
        counters: for Prometheus; None: nobody adds them up.
        alive: False once the communicator is gone; the thread then ends.
        board: see :func:`~llm_allreduce_plugin.runtime.failures.failure_of`.
        watchers: are called in every period.
        error: what has broken the group; default: what the workspace and the board say.
    """

    PERIOD_S = 0.25

    def __init__(
        self,
        workspace: _C.Workspace | None,
        report_dir: Path | None,
        report: Callable[[], dict[str, Any] | None],
        counters: RankCounters | None = None,
        alive: Callable[[], bool] = lambda: True,
        *,
        board: Board | None = None,
        watchers: Sequence[Callable[[], None]] = (),
        error: Callable[[], AllReduceError | None] | None = None,
    ) -> None:
        self._workspace = workspace
        self._board = board
        self._watchers = tuple(watchers)
        self._error = error or self._error_on_record
        self._alive = alive
        # Reports cost time, so they are made only where they go somewhere.
        wanted = report_dir is not None or counters is not None
        self._reporter = Reporter(report_dir, counters, report) if wanted else None
        self._told = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llm-allreduce-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the threads, let go of the workspace and write the last report."""
        self._stop.set()
        self._thread.join()
        self._workspace = None
        self._board = None
        self._watchers = ()
        self._error = self._error_on_record
        if self._reporter is not None:
            self._reporter.close()

    def _run(self) -> None:
        duties = [Guarded("cannot look for expired waits", "expired waits are seen again", self._name_expired_wait)]
        duties += [
            Guarded("cannot check whether peers are alive", "peers are checked again", watcher)
            for watcher in self._watchers
        ]
        while not self._stop.wait(self.PERIOD_S) and self._alive():
            for duty in duties:
                duty()

    def _error_on_record(self) -> AllReduceError | None:
        return None if self._workspace is None else error_of(self._workspace, self._board)

    def _name_expired_wait(self) -> None:
        """Say once which wait has expired."""
        if self._told or self._workspace is None:
            return
        failure = self._error()
        if failure is not None:
            logger.critical("all-reduce failed: %s; the group is unusable from here on", failure)
            self._told = True
