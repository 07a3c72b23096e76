"""The summary of a server whose workers were killed.

A worker that is let go closes its communicator, which logs the summary. But `vllm serve` kills its workers at once
unless it was given a --shutdown-timeout; then the process that started them tells what their last report says.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import multiprocessing
import time
from pathlib import Path

from llm_allreduce_plugin.engines.vllm.logs import use_vllm_logging
from llm_allreduce_plugin.tally import summary_of

logger = logging.getLogger("llm_allreduce_plugin")


@functools.cache
def tell_at_exit(report_dir: Path) -> None:
    """Once per folder, and only in the process that the user started."""
    if multiprocessing.parent_process() is None:
        atexit.register(tell, report_dir, time.time())


def tell(report_dir: Path, since: float) -> None:
    """Log what rank 0 last reported, if it did after ``since`` and could not say so itself."""
    path = report_dir / "rank-0.json"
    try:
        if path.stat().st_mtime < since:
            return
        report = json.loads(path.read_text())
        if report.get("closed", True):  # or vLLM's own all-reduce ran, which nobody counts
            return
        summary = summary_of(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    use_vllm_logging()
    logger.info("all-reduce summary: %s (rank 0's last report)", summary)
