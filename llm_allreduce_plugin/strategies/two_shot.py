"""TWOSHOT: reduce-scatter, then all-gather, both by pushing. Kernels: csrc/{kernels,cpu}/two_shot.*."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.strategies.base import KernelStrategy, Message, spread, spread_in_band

if TYPE_CHECKING:
    from llm_allreduce_plugin import _C
    from llm_allreduce_plugin.selection.decision import Launch
    from llm_allreduce_plugin.selection.facts import GroupFacts


class TwoShot(KernelStrategy):
    name = AllReduceStrategy.TWOSHOT
    algorithm = "two-shot push: every rank sums its share in rank order and stores the result to all peers"

    def plan(self, facts: GroupFacts, message: Message) -> Launch:
        in_band = spread_in_band(message, facts.two_shot_in_band_chunk_bytes, facts.lanes, parts=facts.world_size)
        if in_band is not None:
            return in_band
        return spread(message.vectors, facts.two_shot_chunk_bytes, facts.lanes, parts=facts.world_size)

    def launch(
        self, workspace: _C.Workspace, input_: int, output: int, count: int, dtype: int, launch: Launch, stream: int
    ) -> int:
        return workspace.two_shot(
            input_, output, count, dtype, launch.lanes, launch.threads, launch.chunk_vectors, launch.in_band, stream
        )
