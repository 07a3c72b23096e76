"""NCCL: the engine's own path (gloo for CPU ranks). The last resort of every other strategy."""

from __future__ import annotations

from llm_allreduce_plugin.algorithms.base import Message, Numerics, Strategy
from llm_allreduce_plugin.algorithms.decision import Launch
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy


class Nccl(Strategy):
    name = AllReduceStrategy.NCCL
    numerics = Numerics.ENGINE
    instead = ()
    algorithm = "the engine's own all-reduce"

    def obstacle(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> str | None:  # noqa: ARG002
        return None

    def plan(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Launch | None:  # noqa: ARG002
        return None
