"""Keeps watch beside the calls: says when a wait has expired, and writes the rank's report."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.board import Board, Row, State
from llm_allreduce_plugin.errors import PeerTimeoutError
from llm_allreduce_plugin.failures import ALGORITHMS, PHASES, breakage_of
from llm_allreduce_plugin.metrics import RankCounters

logger = logging.getLogger(__name__)


def failure_of(workspace: _C.Workspace, board: Board | None = None) -> PeerTimeoutError | None:
    """The expired wait on record, or None. Cheap, and safe after the CUDA context has broken.

    ``board``: where ranks say what has become of them, for a text that says why the peer did not come.
    """
    record = workspace.failure()
    if record is None:
        return None
    rank, peer, algorithm, phase, _lane, _expected, _seen, waited_s = record
    where = ALGORITHMS[algorithm], PHASES[phase]
    row = None if board is None else board.row(peer)
    if board is None or row is None:
        return PeerTimeoutError(rank, peer, *where, waited_s)
    if row.state is State.GAVE_UP:
        ago = max(0.0, time.time() - row.wall_s)
        before = f"{row.waited_s:.3g} s for rank {row.peer} in {ALGORITHMS.get(row.algorithm)}/{PHASES.get(row.phase)}"
        if row.peer == rank and _is_later(board, rank, row):
            text = f"rank {rank} came too late: rank {peer} gave up {ago:.3g} s ago, after it had waited {before}"
            return PeerTimeoutError(rank, peer, *where, waited_s, text=text)
        return PeerTimeoutError(
            rank, peer, *where, waited_s, known=f", which gave up {ago:.3g} s ago, after it had waited {before}"
        )
    if row.state is State.BROKEN:
        return PeerTimeoutError(rank, peer, *where, waited_s, known=", which could not go on: see its log")
    if row.state is State.CLOSED:
        return PeerTimeoutError(rank, peer, *where, waited_s, known=", which has closed its communicator")
    known = ", whose process has ended" if board.has_ended(peer) else ""
    return PeerTimeoutError(rank, peer, *where, waited_s, known=known)


def _is_later(board: Board, rank: int, theirs: Row) -> bool:
    """Whether this rank has given up after another had, if at all."""
    own = board.row(rank)
    return own is None or own.state is not State.GAVE_UP or own.wall_s > theirs.wall_s


def write_report(folder: Path, rank: int, report: dict[str, Any]) -> None:
    """Replace ``rank-<rank>.json`` atomically: a reader sees the old or the new file, never half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"rank-{rank}.json"
    partial = folder / f".rank-{rank}.json.{os.getpid()}"
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(target)


class Monitor:
    """A daemon thread per communicator.

    A GPU wait may expire inside a replayed graph, far from any Python call: the device then stops with a CUDA error
    that names nothing. This thread reads the record that the kernel left and puts the named error into the log.

    ``report`` returns None once its communicator is gone; the thread then ends. ``board``: see :func:`failure_of`.
    ``watchers`` are called in every period; what one raises goes to the log once, and it is called again.
    """

    PERIOD_S = 0.25
    REPORT_EVERY = 4  # periods

    def __init__(
        self,
        workspace: _C.Workspace | None,
        rank: int,
        report_dir: Path | None,
        report: Callable[[], dict[str, Any] | None],
        counters: RankCounters | None = None,
        *,
        board: Board | None = None,
        watchers: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._workspace = workspace
        self._board = board
        self._watchers = tuple(watchers)
        self._failed_watchers: list[Callable[[], None]] = []
        self._rank = rank
        self._report_dir = report_dir
        self._report = report
        self._counters = counters
        self._last_report: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llm-allreduce-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, let go of the workspace and write the last report."""
        self._stop.set()
        self._thread.join()
        self._workspace = None
        self._board = None
        self._watchers = ()
        self._write_report()

    def _run(self) -> None:
        told = False
        beat = 0
        while not self._stop.wait(self.PERIOD_S):
            if (
                self._workspace is not None
                and not told
                and (failure := breakage_of(self._workspace) or failure_of(self._workspace, self._board))
            ):
                logger.critical("all-reduce failed: %s; the group is unusable from here on", failure)
                told = True
            self._call_watchers()
            beat += 1
            if beat % self.REPORT_EVERY == 0 and not self._write_report():
                return

    def _call_watchers(self) -> None:
        for watcher in self._watchers:
            try:
                watcher()
            except Exception:
                if watcher not in self._failed_watchers:
                    self._failed_watchers.append(watcher)
                    logger.exception("watching over the group failed; calls go on")

    def _write_report(self) -> bool:
        """Write what has changed; False when there is nobody left to report on."""
        report = self._report()
        if report is None:
            return False
        if report == self._last_report:
            return True
        if self._counters is not None:
            self._counters.publish(report)
        try:
            if self._report_dir is not None:
                write_report(self._report_dir, self._rank, report)
        except OSError as error:
            logger.warning("report_dir=%s cannot be written: %s; no further reports", self._report_dir, error)
            self._report_dir = None
        self._last_report = report
        return True
