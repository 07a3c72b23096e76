"""What the policy says of a norm behind the sum, for groups as GPUs make them."""

from __future__ import annotations

from typing import Any

from llm_allreduce_plugin.algorithms.decision import Launch
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.selection.policy import decide_fused
from llm_allreduce_plugin.topology.links import Transport
from tests.support import group_facts
from tests.support.group_facts import config


def facts(
    world_size: int,
    transport: Transport = Transport.SYMMETRIC,
    workspace: int = 384 << 20,
    in_band: bool = True,
    architecture: int | None = 90,
) -> GroupFacts:
    """Of a size that GPUs' workspaces have; what ranks share is smaller."""
    shared = transport in (Transport.HOST, Transport.SHM)
    return group_facts.facts(world_size, transport, workspace // 8 if shared else workspace, in_band, architecture)


def launch_of(group: GroupFacts, rows: int, hidden: int, strategy: str = "AUTO") -> Launch:
    """Of one kernel, whether or not it pays."""
    decision = decide_fused(config(strategy), group, rows, hidden, "bfloat16", however_slow=True)
    assert decision.launch is not None, decision.reason
    return decision.launch


def reason_of(group: GroupFacts, rows: int, hidden: int, dtype: str = "bfloat16", **settings: Any) -> str:
    decision = decide_fused(config(**settings), group, rows, hidden, dtype)
    assert decision.launch is None
    return decision.reason
