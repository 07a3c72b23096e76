"""Decisions as `llm-allreduce explain --json` prints them."""

from __future__ import annotations

import dataclasses
from typing import Any

from llm_allreduce_plugin.algorithms.decision import Decision, FusedDecision, Launch
from llm_allreduce_plugin.selection.sweep import SizeRange


def launch_fields(launch: Launch | None) -> dict[str, Any] | None:
    """A launch for JSON."""
    if launch is None:
        return None
    return dataclasses.asdict(launch) | {"algorithm": launch.algorithm.name, "exchange": launch.exchange.name}


def decision_fields(decision: Decision) -> dict[str, Any]:
    """A decision for JSON."""
    fields = dataclasses.asdict(decision)
    return fields | {"launch": launch_fields(decision.launch), "is_fallback": decision.is_fallback}


def fused_fields(decision: FusedDecision) -> dict[str, Any]:
    """A decision about an all-reduce with a norm behind it, for JSON."""
    return {
        "runs": decision.counted_as,
        "launch": launch_fields(decision.launch),
        "reason": decision.reason,
        "by_design": decision.by_design,
        "all_reduce": decision_fields(decision.all_reduce),
    }


def range_fields(found: SizeRange) -> dict[str, Any]:
    """Sizes that the same thing happens to, for JSON."""
    return {
        "first_bytes": found.first_bytes,
        "last_bytes": found.last_bytes,
        "runs": found.name,
        "reason": found.decision.reason,
        "is_fallback": found.decision.is_fallback,
        "launch": found.launch_text,
        "first_launch": launch_fields(found.launches[0] if found.launches else None),
        "last_launch": launch_fields(found.launches[-1] if found.launches else None),
    }
