"""MNNVL: the exact kernels over an NVLink domain that spans hosts. AUTO and the exact strategies run there, too.

There is nothing that tells a peer of another host from one of the same, once its memory is mapped: so these are the
kernels of one host, with their bits, and a table says which is the fastest for a size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_allreduce_plugin.algorithms.base import Message
from llm_allreduce_plugin.algorithms.by_table import TableStrategy
from llm_allreduce_plugin.config import AllReduceStrategy

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.facts import GroupFacts
    from llm_allreduce_plugin.config import AllReduceConfig


class MultiNodeNvlink(TableStrategy):
    name = AllReduceStrategy.MNNVL
    instead = (AllReduceStrategy.MINLATENCY, AllReduceStrategy.NCCL)
    algorithm = "the fastest exact kernel for each size over an NVLink domain that spans hosts"

    def obstacle(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> str | None:
        if not facts.fabric:
            return facts.no_fabric_reason or "all ranks are on one host: MNNVL is for an NVLink domain over several"
        return super().obstacle(config, facts, message)
