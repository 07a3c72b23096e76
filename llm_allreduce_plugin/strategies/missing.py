"""The strategies that still have no kernel. Each leaves this file for one of its own."""

from __future__ import annotations

from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.strategies.base import MissingStrategy, Numerics


class UserBuffer(MissingStrategy):
    name = AllReduceStrategy.UB
    numerics = Numerics.EXACT
    algorithm = "zero-copy on registered buffers"


class MultiNodeNvlink(MissingStrategy):
    name = AllReduceStrategy.MNNVL
    numerics = Numerics.EXACT
    algorithm = "kernels over an NVLink domain that spans nodes"
