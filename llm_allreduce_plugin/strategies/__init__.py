"""One module per strategy. AUTO is not one of them: it chooses among them."""

from __future__ import annotations

from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.strategies.base import KernelStrategy, Strategy
from llm_allreduce_plugin.strategies.low_precision import LowPrecision
from llm_allreduce_plugin.strategies.min_latency import MinLatency
from llm_allreduce_plugin.strategies.missing import MultiNodeNvlink, UserBuffer
from llm_allreduce_plugin.strategies.nccl import Nccl
from llm_allreduce_plugin.strategies.one_shot import OneShot
from llm_allreduce_plugin.strategies.two_shot import TwoShot

STRATEGIES: dict[AllReduceStrategy, Strategy] = {
    strategy.name: strategy
    for strategy in (OneShot(), TwoShot(), MinLatency(), UserBuffer(), LowPrecision(), MultiNodeNvlink(), Nccl())
}

__all__ = ["STRATEGIES", "KernelStrategy", "Strategy"]
