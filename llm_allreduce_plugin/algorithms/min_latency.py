"""MINLATENCY: the fastest exact kernel for each size on this node, one-shot or two-shot.

It has no kernel of its own: all exact kernels give the same bits, so it may take whichever is fastest for a size
without an answer ever depending on it. The choice is ``selection.tables``', the same as AUTO's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_allreduce_plugin.algorithms import tables
from llm_allreduce_plugin.algorithms.base import KernelStrategy, Message, Numerics
from llm_allreduce_plugin.algorithms.one_shot import OneShot
from llm_allreduce_plugin.algorithms.two_shot import TwoShot
from llm_allreduce_plugin.config import AllReduceStrategy

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.decision import Launch
    from llm_allreduce_plugin.algorithms.facts import GroupFacts

_KERNELS: dict[str, KernelStrategy] = {"ONESHOT": OneShot(), "TWOSHOT": TwoShot()}


class MinLatency(KernelStrategy):
    name = AllReduceStrategy.MINLATENCY
    numerics = Numerics.EXACT
    algorithm = "the fastest exact kernel for each size on this node"

    def plan(self, facts: GroupFacts, message: Message) -> Launch:
        table = tables.table_of(facts, message.element_bytes)
        _, found = table.range_of(message.payload_bytes)
        return _KERNELS[found.strategy].plan(facts, message)
