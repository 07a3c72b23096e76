"""One module per strategy. AUTO is not one of them: it chooses among them."""

from __future__ import annotations

from llm_allreduce_plugin.algorithms.base import KernelStrategy, Strategy
from llm_allreduce_plugin.algorithms.low_precision import LowPrecision
from llm_allreduce_plugin.algorithms.min_latency import MinLatency
from llm_allreduce_plugin.algorithms.missing import MultiNodeNvlink, UserBuffer
from llm_allreduce_plugin.algorithms.nccl import Nccl
from llm_allreduce_plugin.algorithms.one_shot import OneShot
from llm_allreduce_plugin.algorithms.two_shot import TwoShot
from llm_allreduce_plugin.config import AllReduceStrategy

STRATEGIES: dict[AllReduceStrategy, Strategy] = {
    strategy.name: strategy
    for strategy in (OneShot(), TwoShot(), MinLatency(), UserBuffer(), LowPrecision(), MultiNodeNvlink(), Nccl())
}

__all__ = ["STRATEGIES", "KernelStrategy", "Strategy"]
