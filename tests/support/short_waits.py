"""Communicators whose waits expire soon."""

from __future__ import annotations

from typing import Any

from llm_allreduce_plugin import AllReduceConfig
from llm_allreduce_plugin import TensorParallelCommunicator as Communicator
from llm_allreduce_plugin.measure.ranks import RankContext

TIMEOUT_S = 1.0


def communicator(context: RankContext, **settings: Any) -> Communicator:
    """Of forked ranks, to look at what comes of a peer that does not answer. Collective."""
    values = {"allreduce_strategy": "ONESHOT", "timeout_s": TIMEOUT_S, "first_timeout_s": TIMEOUT_S, **settings}
    return Communicator(context.group, context.device, AllReduceConfig(tuning_profile="none", **values))
