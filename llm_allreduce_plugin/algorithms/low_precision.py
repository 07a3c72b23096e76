"""LOWPRECISION: all-reduces of which all or most travels in a wire format. Kernels: csrc/{kernels,cpu}/low_precision*.

Lossy, so it runs only where it was asked for, and the same bits on every rank all the same: all take the owner's sum as
it was decoded from the wire, the owner too (in the ring, as it was rounded). Over several hosts that a network joins,
only what travels between them is compressed: network.py. What the wire formats are: csrc/codec. Which of its algorithms
runs: low_precision_algorithm.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from llm_allreduce_plugin.algorithms import measured, network, staging, tables
from llm_allreduce_plugin.algorithms.base import (
    MAX_FLAGGED_THREADS,
    MAX_THREADS,
    VECTOR_BYTES,
    KernelStrategy,
    Merit,
    Message,
    Numerics,
    spread_shared,
)
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange, Launch
from llm_allreduce_plugin.algorithms.low_precision_algorithm import AlgorithmChoice, algorithm_of, unit_bytes
from llm_allreduce_plugin.algorithms.packets import WARP_THREADS, packets_of, spread_packets
from llm_allreduce_plugin.algorithms.ranges import bytes_in_words
from llm_allreduce_plugin.config import AllReduceStrategy, LowPrecisionAlgorithm
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.wire import PACKETS

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.facts import GroupFacts
    from llm_allreduce_plugin.config import AllReduceConfig

LARGEST_WORLD_SIZE = 8
FLAGGED_WARPS = MAX_FLAGGED_THREADS // WARP_THREADS
FEWEST_LANES = 3  # one for each task
ELEMENT_BYTES = 2  # what is halved and more must be 16 bits to begin with

_WORDS = {
    LowPrecisionAlgorithm.ONE_SHOT: "one-shot, compressed on the wire",
    LowPrecisionAlgorithm.TWO_SHOT: "two-shot push, compressed on the wire",
    LowPrecisionAlgorithm.RING: "ring, compressed on the wire while it is summed; the rounded sums travel as they are",
    LowPrecisionAlgorithm.HIERARCHICAL: "hierarchical push, compressed on the wire: sums within each of two domains, "
    "which exchange them",
}
_KERNELS = {
    LowPrecisionAlgorithm.TWO_SHOT: Algorithm.TWO_SHOT,
    LowPrecisionAlgorithm.RING: Algorithm.RING,
    LowPrecisionAlgorithm.HIERARCHICAL: Algorithm.HIERARCHICAL,
}


def _flagged_lanes(packets: int, peers: int, most: int) -> int:
    """Lanes of two steps by flags over fast links, of at most ``most``, which are two to a multiprocessor.

    A warp encodes and decodes one packet for one peer. One block to a multiprocessor is enough until there are one and
    a half of these to a warp, of one peer one (``benchmarks/h100/low_precision_shapes_flags_tp2.json``,
    ``benchmarks/h200/low_precision_shapes_flags_tp4.json``).
    """
    few = math.ceil(most / 2)
    if packets > few * min(FLAGGED_WARPS, max(1, FLAGGED_WARPS * 3 // 2 // peers)):
        return most
    return min(few, math.ceil(packets / max(1, FLAGGED_WARPS // peers)))


class LowPrecision(KernelStrategy):
    name = AllReduceStrategy.LOWPRECISION
    numerics = Numerics.LOSSY
    spans_hosts = True
    instead = (AllReduceStrategy.MINLATENCY, AllReduceStrategy.NCCL)
    algorithm = _WORDS[LowPrecisionAlgorithm.TWO_SHOT]

    def describe(self, config: AllReduceConfig, facts: GroupFacts, launch: Launch | None = None) -> tuple[str, str]:
        """Of a launch, what it is: what is large does not go through host memory in one step."""
        choice = algorithm_of(config, facts)
        if facts.crosses_network:
            return network.compressed_in_words(facts, config.low_precision.wire_format), choice.reason
        in_one_step = choice.algorithm is LowPrecisionAlgorithm.ONE_SHOT
        if in_one_step and launch is not None and launch.algorithm is Algorithm.TWO_SHOT:
            most = bytes_in_words(self._one_step_bytes(config, facts))
            reason = f"two_shot: through host memory one step is for messages up to {most}"
            return _WORDS[LowPrecisionAlgorithm.TWO_SHOT], reason
        return _WORDS[choice.algorithm], choice.reason

    def numerics_of(self, facts: GroupFacts) -> Numerics:
        return Numerics.LOSSY_HOSTS if facts.crosses_network else self.numerics

    def obstacle(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> str | None:
        if (reason := super().obstacle(config, facts, message)) is not None:
            return reason
        if message.element_bytes != ELEMENT_BYTES:
            return f"compression is for bfloat16 and float16, not {message.dtype}"
        if facts.crosses_network and config.low_precision.wire_format.keeps_rows:
            return (
                f"{config.low_precision.wire_format} is not sent between hosts: there parts of a message begin inside "
                "its groups, and the answer for a row would depend on the rows beside it"
            )
        if facts.crosses_network:  # inside a host nothing is compressed, and all slots are those of exact sums
            return None
        if facts.world_size > LARGEST_WORLD_SIZE:
            return f"compression is for 2 to {LARGEST_WORLD_SIZE} ranks, not {facts.world_size}"
        packet = PACKETS[config.low_precision.wire_format]
        slot_bytes = self._slots(config, facts)
        algorithm, one_step = algorithm_of(config, facts).algorithm, LowPrecisionAlgorithm.ONE_SHOT
        two_steps = algorithm is LowPrecisionAlgorithm.TWO_SHOT
        two_steps |= algorithm is one_step and facts.transport is Transport.HOST  # what is large
        if two_steps and slot_bytes < packet.bytes:
            return (
                f"a slot of the workspace ({slot_bytes} bytes) holds no packet of "
                f"{config.low_precision.wire_format} ({packet.bytes} bytes)"
            )
        return None

    def pays(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Merit:
        """Small messages are faster with the exact kernels, or the settings say so.

        A format that keeps rows is asked for because of that: without ``min_bytes`` it runs at every size.
        """
        settings = config.low_precision
        size = bytes_in_words(message.payload_bytes)
        if settings.min_bytes is None and settings.wire_format.keeps_rows:
            return Merit(pays=True)  # what is exact in a small batch must not be rounded in a large one
        if settings.min_bytes is not None:
            asked = bytes_in_words(int(settings.min_bytes))
            reason = f"messages below {asked} stay exact (low_precision.min_bytes)"
            if settings.wire_format.keeps_rows:
                reason += "; a row's answer then depends on its batch"
            if message.payload_bytes < settings.min_bytes:
                return Merit(pays=False, reason=reason)
            return Merit(pays=True, reason=f"{size} are at least {asked} (low_precision.min_bytes)")
        least, source = tables.low_precision_pays_from(facts, settings.wire_format, message.element_bytes)
        if least is None:
            if facts.crosses_network:
                reason = f"at no size {settings.wire_format} between hosts is faster than exact sums ({source})"
            else:
                reason = f"from which size on {settings.wire_format} is faster than exact sums is not known: {source}"
            return Merit(pays=False, reason=reason)
        if message.payload_bytes < least:
            reason = (
                f"below {bytes_in_words(least)} the exact kernels are faster than {settings.wire_format} ({source})"
            )
            return Merit(pays=False, reason=reason)
        if least == 0:  # whatever the size
            return Merit(pays=True, reason=source)
        faster = f"from which on {settings.wire_format} is faster than exact sums"
        return Merit(pays=True, reason=f"{size} are at least {bytes_in_words(least)}, {faster} ({source})")

    @staticmethod
    def _in_band(config: AllReduceConfig, facts: GroupFacts) -> bool:
        """Packets of FP8, in groups or not, have no word that could be taken for the in-band marker; others' may."""
        return config.low_precision.wire_format.goes_in_band and facts.in_band.two_shot > 0

    def _pushes_in_band(self, config: AllReduceConfig, facts: GroupFacts) -> bool:
        return self._in_band(config, facts) and facts.transport is not Transport.HOST

    def _shares(self, config: AllReduceConfig, facts: GroupFacts, message: Message, part_bytes: int) -> bool:
        """Whether a message goes through host memory in one round of in-band slots: it can, and it pays."""
        fits = self._in_band(config, facts) and part_bytes <= facts.in_band.two_shot
        return fits and message.payload_bytes <= tables.host_in_band_bytes(self.name, facts.world_size)

    def _slots(self, config: AllReduceConfig, facts: GroupFacts) -> int:
        return facts.in_band.two_shot if self._pushes_in_band(config, facts) else facts.flagged.two_shot

    def plan(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Launch:
        """CPU ranks have one lane. Two steps in band: in large messages a lane has one task, as in exact kernels'."""
        wire_format = config.low_precision.wire_format
        if facts.crosses_network:
            return dataclasses.replace(network.plan(facts, message, Algorithm.TWO_SHOT), wire_format=wire_format)
        choice = algorithm_of(config, facts)
        if choice.algorithm is LowPrecisionAlgorithm.ONE_SHOT:
            if (launch := self._plan_one_step(config, facts, message)) is not None:
                return launch
            choice = dataclasses.replace(choice, algorithm=LowPrecisionAlgorithm.TWO_SHOT)
        if choice.algorithm is not LowPrecisionAlgorithm.TWO_SHOT:
            return self._plan_flagged(config, facts, message, choice)
        packet = PACKETS[wire_format]
        packets = packets_of(message.count, wire_format, facts.world_size)  # of the largest part
        staged = staging.launch(
            config,
            facts,
            Algorithm.TWO_SHOT,
            packets * facts.world_size,
            unit_bytes=packet.bytes,
            unit_threads=WARP_THREADS,
        )
        if staged is not None:
            return dataclasses.replace(staged, wire_format=wire_format)
        if self._pushes_in_band(config, facts):
            return self._plan_in_band(config, facts, message, packets)
        if self._shares(config, facts, message, packets * packet.bytes):
            launch = spread_shared(Algorithm.TWO_SHOT, packets * packet.bytes // VECTOR_BYTES, facts.lanes)
            return dataclasses.replace(launch, wire_format=wire_format)
        return self._plan_flagged(config, facts, message, choice)

    def _one_step_bytes(self, config: AllReduceConfig, facts: GroupFacts) -> int:
        """The largest message that goes through host memory in one step: it fits a slot, and it pays."""
        packet = PACKETS[config.low_precision.wire_format]
        fit = facts.in_band.one_shot // packet.bytes * packet.values * ELEMENT_BYTES
        return min(fit, measured.ONE_STEP_HOST_BYTES, tables.host_in_band_bytes(self.name, facts.world_size))

    def _plan_one_step(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Launch | None:
        """In rounds of in-band slots; None through host memory where a message does not fit one, or that is slower."""
        wire_format = config.low_precision.wire_format
        packets = packets_of(message.count, wire_format, 1)
        on_host = facts.transport is Transport.HOST
        if on_host and message.payload_bytes > self._one_step_bytes(config, facts):
            return None
        return spread_packets(
            Algorithm.ONE_SHOT,
            Exchange.SHARED if on_host else Exchange.PUSH,
            wire_format,
            packets,
            slot_bytes=facts.in_band.one_shot,
            lanes=facts.lanes,
            few=facts.lanes if on_host else math.ceil(facts.lanes / 2),  # one block to a multiprocessor
        )

    def _plan_flagged(
        self, config: AllReduceConfig, facts: GroupFacts, message: Message, choice: AlgorithmChoice
    ) -> Launch:
        """A lane has packets for a warp each, of those that fit its slots, before there is another lane."""
        unit = unit_bytes(config, choice.algorithm)
        parts = facts.world_size // 2 if choice.domains else facts.world_size
        packets = packets_of(message.count, config.low_precision.wire_format, parts)  # of the largest part
        most = tables.flagged_lanes(self.name, facts, message.payload_bytes)
        capacity = facts.flagged.two_shot // unit
        warps = FLAGGED_WARPS
        if choice.algorithm is not LowPrecisionAlgorithm.TWO_SHOT:
            warps = min(warps, capacity)
        over_links = facts.transport is Transport.SYMMETRIC and choice.algorithm is LowPrecisionAlgorithm.TWO_SHOT
        if over_links:
            lanes = _flagged_lanes(packets, facts.world_size - 1, most)
        else:
            lanes = min(most, math.ceil(packets / warps))
        lanes = max(1, lanes)
        chunk = min(capacity, math.ceil(packets / lanes))
        if facts.transport is Transport.HOST or over_links:
            chunk = min(chunk, FLAGGED_WARPS)  # of more, warps would wait for those that have one more than they
        return Launch(
            _KERNELS[choice.algorithm],
            Exchange.FLAGS,
            lanes=lanes,
            threads=warps * WARP_THREADS,
            chunk_vectors=chunk * unit // VECTOR_BYTES,
            rounds=math.ceil(packets / chunk / lanes),
            wire_format=config.low_precision.wire_format,
            domains=choice.domains,
        )

    def _plan_in_band(self, config: AllReduceConfig, facts: GroupFacts, message: Message, packets: int) -> Launch:
        spread = spread_packets(
            Algorithm.TWO_SHOT,
            Exchange.PUSH,
            config.low_precision.wire_format,
            packets,
            slot_bytes=self._slots(config, facts),
            lanes=facts.lanes,
            few=math.ceil(facts.lanes / 2),  # one block to a multiprocessor
        )
        split = tables.split(self.name, facts.world_size, message.payload_bytes)
        if split is None:
            return spread
        lanes = max(FEWEST_LANES, facts.lanes * split.lanes // measured.LARGEST_GRID)
        return dataclasses.replace(
            spread,
            lanes=lanes,
            threads=MAX_THREADS,
            scatter_lanes=max(1, lanes * split.scatter // split.lanes),
            drain_lanes=lanes * split.drain // split.lanes,
        )
