"""How calls whose packets travel in band are spread over warps. Pure.

A warp takes a packet at a time. Where every lane does everything, a lane has as few warps as all packets together need:
small blocks start sooner, and packets spread over all multiprocessors.
"""

from __future__ import annotations

import math

from llm_allreduce_plugin.algorithms.base import MAX_FLAGGED_THREADS, MAX_THREADS, VECTOR_BYTES
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange, Launch
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.wire import PACKETS

WARP_THREADS = 32


def packets_of(count: int, wire_format: WireFormat, parts: int) -> int:
    """Packets of the largest of ``parts`` parts of a message of ``count`` values; at least one."""
    return max(1, math.ceil(count / PACKETS[wire_format].values / parts))


def spread_packets(
    algorithm: Algorithm,
    exchange: Exchange,
    wire_format: WireFormat,
    packets: int,
    *,
    slot_bytes: int,
    lanes: int,
    few: int,
) -> Launch:
    """A call in which every warp does everything for its packets.

    Args:
        algorithm: ``ONE_SHOT`` or ``TWO_SHOT``.
        exchange: ``PUSH`` or ``SHARED``.
        wire_format: of the packets.
        packets: of the message (one-shot), or of the largest part.
        slot_bytes: of the slot that a round fills; at least one packet.
        lanes: blocks at most.
        few: blocks that a call has before its blocks become larger.
    """
    bytes_of_packet = PACKETS[wire_format].bytes
    rounds = math.ceil(packets / (slot_bytes // bytes_of_packet))
    chunk = math.ceil(packets / rounds)
    most = (MAX_THREADS if exchange is Exchange.PUSH else MAX_FLAGGED_THREADS) // WARP_THREADS
    warps = min(most, math.ceil(chunk / few))
    return Launch(
        algorithm,
        exchange,
        lanes=min(lanes, math.ceil(chunk / warps)),
        threads=warps * WARP_THREADS,
        chunk_vectors=chunk * bytes_of_packet // VECTOR_BYTES,
        rounds=math.ceil(packets / chunk),
        wire_format=wire_format,
    )
