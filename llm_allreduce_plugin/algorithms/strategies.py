"""The list of all strategies: what runs, and what can be asked for."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

from llm_allreduce_plugin.algorithms.base import KernelStrategy, Strategy
from llm_allreduce_plugin.algorithms.by_table import Auto, MinLatency, TableStrategy
from llm_allreduce_plugin.algorithms.low_precision import LowPrecision
from llm_allreduce_plugin.algorithms.mnnvl import MultiNodeNvlink
from llm_allreduce_plugin.algorithms.nccl import Nccl
from llm_allreduce_plugin.algorithms.one_shot import OneShot
from llm_allreduce_plugin.algorithms.two_shot import TwoShot
from llm_allreduce_plugin.algorithms.user_buffer import UserBuffer
from llm_allreduce_plugin.config import AllReduceStrategy

# By the name under which they run.
STRATEGIES: dict[AllReduceStrategy, Strategy] = {
    strategy.name: strategy
    for strategy in (OneShot(), TwoShot(), MinLatency(), UserBuffer(), LowPrecision(), MultiNodeNvlink(), Nccl())
}
# By the name under which they are asked for: AUTO runs nothing under its own.
ASKED_FOR: Mapping[AllReduceStrategy, Strategy] = ChainMap(STRATEGIES, {AllReduceStrategy.AUTO: Auto()})

__all__ = ["ASKED_FOR", "STRATEGIES", "KernelStrategy", "Strategy", "TableStrategy"]
