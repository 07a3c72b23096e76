"""ONESHOT: push every rank's vector to every peer, reduce locally. Kernels: csrc/{kernels,cpu}/one_shot.*."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.strategies.base import KernelStrategy, Message, spread, spread_in_band

if TYPE_CHECKING:
    from llm_allreduce_plugin import _C
    from llm_allreduce_plugin.selection.decision import Launch
    from llm_allreduce_plugin.selection.facts import GroupFacts

# More blocks only add flags to exchange: 64 blocks of 512 threads already put 512 KiB in flight to every peer.
MAX_FLAGGED_LANES = 64


class OneShot(KernelStrategy):
    name = AllReduceStrategy.ONESHOT
    algorithm = "one-shot push: every rank stores its vector to all peers, each sums in rank order"

    def plan(self, facts: GroupFacts, message: Message) -> Launch:
        in_band = spread_in_band(message, facts.one_shot_in_band_chunk_bytes, facts.lanes, parts=1)
        if in_band is not None:
            return in_band
        return spread(message.vectors, facts.one_shot_chunk_bytes, min(facts.lanes, MAX_FLAGGED_LANES), parts=1)

    def launch(
        self, workspace: _C.Workspace, input_: int, output: int, count: int, dtype: int, launch: Launch, stream: int
    ) -> int:
        return workspace.one_shot(
            input_, output, count, dtype, launch.lanes, launch.threads, launch.chunk_vectors, launch.in_band, stream
        )
