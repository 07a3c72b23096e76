"""Counters for Prometheus, by strategy and by reason for a fallback. Does nothing without prometheus_client.

An engine's metrics endpoint lives in another process than the ranks, so there are two ways there. In Prometheus'
multi-process mode (``PROMETHEUS_MULTIPROC_DIR``) every rank keeps counters that the endpoint adds up. Otherwise the
endpoint's process reads the files of ``report_dir``.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_allreduce_plugin.runtime.reports import Reader, Report

MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CALLS = "llm_allreduce_calls"
CALLS_HELP = "All-reduces by strategy; a call in a CUDA graph counts once, when it is captured"
CALLS_LABELS = ("group", "rank", "strategy", "how")
FALLBACKS = "llm_allreduce_fallbacks"
FALLBACKS_HELP = "All-reduces that ran another strategy than the configured one, with the reason"
FALLBACKS_LABELS = ("group", "rank", "requested", "strategy", "reason")

Sample = tuple[str, tuple[str, ...], float]


def samples_of(report: Report) -> Iterator[Sample]:
    """The counters in a communicator's report: name, label values, number.

    Group and rank name one part of one process: no two reports have a sample in common.
    """
    of = (report.group, str(report.rank))
    for how, counts in (("eager", report.calls), ("captured", report.captured)):
        for strategy, calls in counts.items():
            yield CALLS, (*of, strategy, how), calls
    for found in report.fallback_calls:
        yield FALLBACKS, (*of, found.requested, found.strategy, found.reason), found.calls


@functools.cache
def _counters() -> dict[str, Any]:
    from prometheus_client import Counter

    return {
        CALLS: Counter(CALLS, CALLS_HELP, CALLS_LABELS),
        FALLBACKS: Counter(FALLBACKS, FALLBACKS_HELP, FALLBACKS_LABELS),
    }


class RankCounters:
    """A rank's counters in multi-process mode."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, tuple[str, ...]], float] = {}

    @classmethod
    def if_wanted(cls) -> RankCounters | None:
        """None where nobody adds up what several processes count, or prometheus_client is missing."""
        if not os.environ.get(MULTIPROCESS_FOLDER):
            return None
        try:
            _counters()
        except (ImportError, OSError, ValueError):  # ValueError: the folder does not exist
            return None
        return cls()

    def publish(self, report: dict[str, Any]) -> None:
        """Bring the counters up to a communicator's report.

        Raises:
            ValueError: it is none.
        """
        for name, labels, value in samples_of(Report.model_validate(report)):
            more = value - self._seen.get((name, labels), 0.0)
            if more > 0:
                _counters()[name].labels(*labels).inc(more)
                self._seen[name, labels] = value


class ReportCollector:
    """Shows the reports in a folder to a registry of the process that serves metrics.

    Args:
        folder: of the reports.
        since: seconds since 1970, before which those of earlier runs were written; None: now.
    """

    def __init__(self, folder: Path, since: float | None = None) -> None:
        self._reader = Reader(folder, time.time() if since is None else since)

    def describe(self) -> Iterator[Any]:
        """What prometheus_client asks for at registering: names without numbers, so that nothing is read there."""
        yield from _families().values()

    def collect(self) -> Iterator[Any]:
        """What prometheus_client asks for at every scrape. Files of earlier runs and other servers are left out.

        Where the folder hangs, it has what was read before.
        """
        families = _families()
        for report in sorted(self._reader.read(), key=lambda report: (report.group, report.rank)):
            for name, labels, value in samples_of(report):
                families[name].add_metric(labels, value)
        yield from families.values()


def _families() -> dict[str, Any]:
    from prometheus_client.core import CounterMetricFamily

    return {
        CALLS: CounterMetricFamily(CALLS, CALLS_HELP, labels=CALLS_LABELS),
        FALLBACKS: CounterMetricFamily(FALLBACKS, FALLBACKS_HELP, labels=FALLBACKS_LABELS),
    }


@functools.cache
def show_reports(folder: Path) -> bool:
    """Let this process's metrics endpoint show the reports in ``folder``. Once per folder; False when it cannot."""
    if os.environ.get(MULTIPROCESS_FOLDER):
        return False  # the ranks' own counters are there already
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        return False
    try:
        REGISTRY.register(ReportCollector(folder))
    except ValueError:  # another folder is shown already
        return False
    return True
