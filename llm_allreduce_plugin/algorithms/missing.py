"""The strategies that still have no kernel. Each leaves this file for one of its own."""

from __future__ import annotations

from llm_allreduce_plugin.algorithms.base import MissingStrategy, Numerics
from llm_allreduce_plugin.config import AllReduceStrategy


class UserBuffer(MissingStrategy):
    name = AllReduceStrategy.UB
    numerics = Numerics.EXACT
    instead = (AllReduceStrategy.TWOSHOT, AllReduceStrategy.NCCL)
    algorithm = "zero-copy on registered buffers"


class MultiNodeNvlink(MissingStrategy):
    name = AllReduceStrategy.MNNVL
    numerics = Numerics.EXACT
    instead = (AllReduceStrategy.MINLATENCY, AllReduceStrategy.NCCL)
    algorithm = "kernels over an NVLink domain that spans nodes"
