"""Reports of an engine's processes, and of groups in which its own all-reduce runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from llm_allreduce_plugin.base.agreement import stand_aside
from llm_allreduce_plugin.base.members import new_member
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.engines.common.summary import tell_at_exit
from llm_allreduce_plugin.runtime import reports
from llm_allreduce_plugin.runtime.metrics import show_reports
from llm_allreduce_plugin.runtime.reporter import Reporter

logger = logging.getLogger("llm_allreduce_plugin")


def read_reports(report_dir: Path, use_logging: Callable[[], None], *, metrics: bool = True) -> None:
    """In the process that starts the others, before it does: their reports become metrics, and a summary at its end.

    Args:
        report_dir: of the settings.
        use_logging: lets lines go where the engine's go.
        metrics: off where ranks count by themselves: Prometheus must not be loaded before the engine sets that up.
    """
    reports.mark_server()
    if metrics:
        show_reports(report_dir)  # counts, where this process serves metrics
    tell_at_exit(report_dir, use_logging)


def report_engines_own(
    engine: str,
    control_group: dist.ProcessGroup,
    rank: int,
    ranks: Sequence[int],
    settings: AllReduceConfig,
    reason: str,
    name: str,
) -> None:
    """The engine's own all-reduce runs, so there is nothing of ours to count; the log and the report say so.

    Ranks that decide otherwise, because their settings are other ones, would wait for this one: they are told.

    Args:
        engine: as people call it: ``"vLLM"``.
        control_group: through whose store ranks would agree.
        rank: in the group.
        ranks: of the group, as the whole job numbers them.
        settings: of the plugin.
        reason: why it is left in place.
        name: what the engine calls the group.
    """
    stand_aside(control_group, f"{engine}'s own all-reduce is left in place there: {reason}")
    if rank == 0:
        logger.info("%s's own all-reduce is left in place: %s", engine, reason)
    if settings.report_dir is None:
        return
    # Ranks have agreed on nothing here, so each names a group of its own.
    identity = reports.Identity(rank, ranks, name, new_member())
    report = {
        **identity.fields(),
        "allreduce_strategy": str(settings.allreduce_strategy),
        "sizes": f"{engine}'s own all-reduce at every size",
        "closed": True,
        "calls": {},
        "note": f"{engine}'s own all-reduce is left in place and not counted: {reason}",
    }
    Reporter.write_once(settings.report_dir, report)
