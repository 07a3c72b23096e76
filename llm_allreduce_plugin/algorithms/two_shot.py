"""TWOSHOT: reduce-scatter, then all-gather, both by pushing. Kernels: csrc/{kernels,cpu}/two_shot_*."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llm_allreduce_plugin.algorithms import multicasting, network, pulling, staging, tables
from llm_allreduce_plugin.algorithms.base import (
    VECTOR_BYTES,
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


class TwoShot(KernelStrategy):
    name = AllReduceStrategy.TWOSHOT
    numerics = Numerics.EXACT
    spans_hosts = True
    algorithm = "two-shot push: every rank sums its share in rank order and stores the result to all peers"

    def describe(self, config: AllReduceConfig, facts: GroupFacts, launch: Launch | None = None) -> tuple[str, str]:  # noqa: ARG002
        in_words = network.in_words(self.algorithm, facts, Algorithm.TWO_SHOT)
        return in_words, multicasting.in_words(config, facts, Algorithm.TWO_SHOT)

    def plan(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Launch:
        if facts.crosses_network:
            return network.plan(facts, message, Algorithm.TWO_SHOT)
        parts = facts.world_size
        slot_bytes = facts.in_band.two_shot
        staged = staging.launch(config, facts, Algorithm.TWO_SHOT, message.vectors)
        if staged is not None:
            return staged
        if facts.transport is Transport.HOST:
            vectors = math.ceil(message.vectors / parts)  # of the largest part
            limit = tables.host_in_band_bytes(self.name, facts.world_size)
            if vectors * VECTOR_BYTES <= slot_bytes and message.payload_bytes <= limit:
                return spread_shared(Algorithm.TWO_SHOT, vectors, facts.lanes, per_thread=2)
        elif slot_bytes:
            split = tables.split(self.name, facts.world_size, message.payload_bytes)
            pushed = spread_in_band(message, facts, Algorithm.TWO_SHOT, slot_bytes, parts, split)
            return multicasting.launch(config, facts, message, pulling.launch(pushed, message))
        lanes = tables.flagged_lanes(self.name, facts, message.payload_bytes)
        most = tables.vectors_per_thread(facts.transport)
        return spread(message.vectors, Algorithm.TWO_SHOT, facts.flagged.two_shot, lanes, parts, most)
