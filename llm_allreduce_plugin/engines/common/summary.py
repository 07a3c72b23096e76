"""The summary of a server whose workers were killed.

A worker that is let go closes its communicator, which logs the summary. But engines kill their workers at once (`vllm
serve` unless it was given a --shutdown-timeout); then the process that started them tells what their last reports say.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from llm_allreduce_plugin.runtime.reports import Reader, Report
from llm_allreduce_plugin.runtime.tally import summary_of

logger = logging.getLogger("llm_allreduce_plugin")


_untold: list[Callable[[], None]] = []


@functools.cache
def tell_at_exit(report_dir: Path, use_logging: Callable[[], None]) -> None:
    """Once per folder, and only in the process that the user started. ``use_logging``: see :func:`tell`."""
    if multiprocessing.parent_process() is None:
        _untold.append(functools.partial(tell, report_dir, time.time(), use_logging))
        atexit.register(tell_now)


def tell_now() -> None:
    """What :func:`tell_at_exit` would tell, before a process kills itself and has no exit. Each summary comes once."""
    while _untold:
        _untold.pop()()


def tell(report_dir: Path, since: float, use_logging: Callable[[], None] = lambda: None) -> None:
    """Log what each group of this server last reported, if it did after ``since`` and could not say so itself.

    Waits for no folder that hangs. ``use_logging``: lets lines go where the engine's go; called before the first one.
    """
    groups: dict[str, list[Report]] = {}
    for report in Reader(report_dir, since).read():
        groups.setdefault(report.group, []).append(report)
    lines = [line for group in sorted(groups) if (line := _line(groups[group], several=len(groups) > 1)) is not None]
    if lines:
        use_logging()
    for line in lines:
        logger.info("%s", line)


def _line(reports: Iterable[Report], *, several: bool) -> str | None:
    """The summary of one group; None when it has said so itself, or ran the engine's own, which nobody counts."""
    by_rank = sorted(reports, key=lambda report: report.rank)
    if by_rank[0].closed:
        return None
    # All ranks make the same calls, and are not killed at the same moment: the one that tells most is the newest.
    newest = max(by_rank, key=lambda report: report.total)
    of = f" of {newest.group}" if several else ""
    if not newest.total:
        return f"all-reduce summary{of}: no calls up to the last report of its ranks"
    return f"all-reduce summary{of}: {summary_of(newest)} (rank {newest.rank}'s last report)"
