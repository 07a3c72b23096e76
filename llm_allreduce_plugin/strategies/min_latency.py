"""MINLATENCY: the fastest exact kernel for each size on this node, one-shot or two-shot.

It has no kernel of its own: all exact kernels give the same bits, so it may take whichever is fastest for a size
without an answer ever depending on it. The choice is ``selection.tables``', the same as AUTO's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.selection import tables
from llm_allreduce_plugin.strategies.base import KernelStrategy, Message, Numerics
from llm_allreduce_plugin.strategies.one_shot import OneShot
from llm_allreduce_plugin.strategies.two_shot import TwoShot

if TYPE_CHECKING:
    from llm_allreduce_plugin.selection.decision import Launch
    from llm_allreduce_plugin.selection.facts import GroupFacts

_KERNELS: dict[str, KernelStrategy] = {"ONESHOT": OneShot(), "TWOSHOT": TwoShot()}


class MinLatency(KernelStrategy):
    name = AllReduceStrategy.MINLATENCY
    numerics = Numerics.EXACT
    algorithm = "the fastest exact kernel for each size on this node"

    def plan(self, facts: GroupFacts, message: Message) -> Launch:
        table = tables.table_of(facts, message.element_bytes)
        _, found = table.range_of(message.payload_bytes)
        return _KERNELS[found.strategy].plan(facts, message)
