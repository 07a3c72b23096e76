"""LOWPRECISION: two-shot push with all that travels in a wire format. Kernels: csrc/{kernels,cpu}/low_precision.*.

Lossy, so it runs only where it was asked for, and the same bits on every rank all the same: all take the owner's sum as
it was decoded from the wire, the owner too. What the wire formats are: csrc/codec.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.selection import tables
from llm_allreduce_plugin.selection.decision import Algorithm, Launch
from llm_allreduce_plugin.strategies.base import MAX_THREADS, VECTOR_BYTES, KernelStrategy, Message
from llm_allreduce_plugin.wire import PACKETS

if TYPE_CHECKING:
    from llm_allreduce_plugin.selection.facts import GroupFacts

LARGEST_WORLD_SIZE = 8
WARP_THREADS = 32
FEWEST_LANES = 3  # one for each task
ELEMENT_BYTES = 2  # what is halved and more must be 16 bits to begin with


class LowPrecision(KernelStrategy):
    name = AllReduceStrategy.LOWPRECISION
    algorithm = "two-shot push, compressed on the wire"

    def obstacle(self, facts: GroupFacts, message: Message) -> str | None:
        if (reason := super().obstacle(facts, message)) is not None:
            return reason
        if facts.device != "cpu":
            return "the LOWPRECISION kernel for GPUs has not been tried on one yet"
        if facts.world_size > LARGEST_WORLD_SIZE:
            return f"compression is for 2 to {LARGEST_WORLD_SIZE} ranks, not {facts.world_size}"
        if message.element_bytes != ELEMENT_BYTES:
            return f"compression is for bfloat16 and float16, not {message.dtype}"
        packet = PACKETS[facts.low_precision.wire_format]
        if facts.two_shot_chunk_bytes < packet.bytes:
            return (
                f"a slot of the workspace ({facts.two_shot_chunk_bytes} bytes) holds no packet of "
                f"{facts.low_precision.wire_format} ({packet.bytes} bytes)"
            )
        least = int(facts.low_precision.min_bytes or 0)
        if message.payload_bytes < least:
            return f"messages below low_precision.min_bytes ({least}) stay exact"
        return None

    def plan(self, facts: GroupFacts, message: Message) -> Launch:
        """CPU ranks have one lane; on GPUs every lane has one task, as in the exact kernels' large messages."""
        wire_format = facts.low_precision.wire_format
        packet = PACKETS[wire_format]
        packets = max(1, math.ceil(message.count / packet.values / facts.world_size))  # of the largest part
        rounds = math.ceil(packets / (facts.two_shot_chunk_bytes // packet.bytes))
        chunk = math.ceil(packets / rounds)
        launch = Launch(
            Algorithm.LOW_PRECISION,
            lanes=1,
            threads=32,
            chunk_vectors=chunk * packet.bytes // VECTOR_BYTES,
            rounds=math.ceil(packets / chunk),
            wire_format=wire_format,
        )
        if not facts.in_band:
            return launch
        split = tables.LOW_PRECISION_SPLIT
        # A warp to a packet: no more lanes than the part has packets for.
        warps = MAX_THREADS // WARP_THREADS
        lanes = min(facts.lanes * split.lanes // tables.LARGEST_GRID, max(FEWEST_LANES, math.ceil(packets / warps) * 3))
        return dataclasses.replace(
            launch,
            lanes=lanes,
            threads=MAX_THREADS,
            in_band=True,
            scatter_lanes=max(1, lanes * split.scatter // split.lanes),
            drain_lanes=max(1, lanes * split.drain // split.lanes),
        )
