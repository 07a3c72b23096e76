"""ONESHOT: push every rank's vector to every peer, reduce locally. Kernels: csrc/{kernels,cpu}/one_shot_*."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_allreduce_plugin.algorithms import multicasting, network, tables
from llm_allreduce_plugin.algorithms.base import (
    KernelStrategy,
    Message,
    Numerics,
    spread,
    spread_in_band,
    spread_shared,
)
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.topology.links import Transport

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.decision import Launch
    from llm_allreduce_plugin.algorithms.facts import GroupFacts
    from llm_allreduce_plugin.config import AllReduceConfig

# More blocks only add flags to exchange: 128 blocks of 256 threads already put 512 KiB in flight to every peer.
MAX_FLAGGED_LANES = 128


class OneShot(KernelStrategy):
    name = AllReduceStrategy.ONESHOT
    numerics = Numerics.EXACT
    spans_hosts = True
    instead = (AllReduceStrategy.TWOSHOT, AllReduceStrategy.NCCL)
    algorithm = "one-shot push: every rank stores its vector to all peers, each sums in rank order"

    def describe(self, config: AllReduceConfig, facts: GroupFacts, launch: Launch | None = None) -> tuple[str, str]:  # noqa: ARG002
        in_words = network.in_words(self.algorithm, facts, Algorithm.ONE_SHOT)
        return in_words, multicasting.in_words(config, facts, Algorithm.ONE_SHOT)

    def plan(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Launch:
        if facts.crosses_network:
            return network.plan(facts, message, Algorithm.ONE_SHOT)
        slot_bytes = facts.in_band.one_shot
        if facts.transport is Transport.HOST:
            if message.payload_bytes <= min(slot_bytes, tables.host_in_band_bytes(self.name, facts.world_size)):
                return spread_shared(Algorithm.ONE_SHOT, message.vectors, facts.lanes)
        elif slot_bytes:
            split = tables.split(self.name, facts.world_size, message.payload_bytes)
            pushed = spread_in_band(message, facts, Algorithm.ONE_SHOT, slot_bytes, 1, split)
            return multicasting.launch(config, facts, message, pushed)
        lanes = tables.flagged_lanes(self.name, facts, message.payload_bytes)
        most = tables.vectors_per_thread(facts.transport)
        return spread(
            message.vectors, Algorithm.ONE_SHOT, facts.flagged.one_shot, min(lanes, MAX_FLAGGED_LANES), 1, most
        )
