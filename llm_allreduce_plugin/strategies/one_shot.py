"""ONESHOT: push every rank's vector to every peer, reduce locally. Kernels: csrc/{kernels,cpu}/one_shot.*."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.strategies.base import KernelStrategy, Message, spread_best

if TYPE_CHECKING:
    from llm_allreduce_plugin import _C
    from llm_allreduce_plugin.selection.decision import Launch
    from llm_allreduce_plugin.selection.facts import GroupFacts


class OneShot(KernelStrategy):
    name = AllReduceStrategy.ONESHOT
    algorithm = "one-shot push: every rank stores its vector to all peers, each sums in rank order"

    def plan(self, facts: GroupFacts, message: Message) -> Launch:
        in_band, flagged = facts.one_shot_in_band_chunk_bytes, facts.one_shot_chunk_bytes
        return spread_best(message, in_band, flagged, facts.lanes, parts=1)

    def launch(
        self, workspace: _C.Workspace, input_: int, output: int, count: int, dtype: int, launch: Launch, stream: int
    ) -> int:
        return workspace.one_shot(
            input_, output, count, dtype, launch.lanes, launch.threads, launch.chunk_vectors, launch.in_band, stream
        )
