"""Which of LOWPRECISION's algorithms runs in a group, and why. Pure, like the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.algorithms.base import Merit
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.config import AllReduceConfig, LowPrecisionAlgorithm, WireFormat
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.wire import PACKETS

MOST_MEMBERS = 4  # ranks of a domain
LARGEST_ELEMENT = ELEMENT_BYTES["bfloat16"]  # what is halved and more is 16 bits to begin with


@dataclasses.dataclass(frozen=True)
class AlgorithmChoice:
    """One of the algorithms, and why.

    Attributes:
        algorithm: never ``AUTO``.
        reason: why this one.
        is_fallback: another one was asked for by name.
        domains: the domain of each rank, of ``HIERARCHICAL``.
    """

    algorithm: LowPrecisionAlgorithm
    reason: str
    is_fallback: bool = False
    domains: tuple[int, ...] = ()


def domains_of(config: AllReduceConfig, facts: GroupFacts) -> tuple[tuple[int, ...], str]:
    """The domain of each rank, and where that comes from; empty when nobody knows."""
    if config.low_precision.domains is not None:
        return config.low_precision.domains, "low_precision.domains"
    return facts.domains, "NUMA nodes"


def domains_obstacle(domains: Sequence[int]) -> str | None:
    """Why ranks do not form two domains of equal size, of 2 to 4 ranks each, or None."""
    if not domains:
        return "the NUMA node of every rank's GPU is not known (set low_precision.domains)"
    sizes = [domains.count(domain) for domain in dict.fromkeys(domains)]
    if len(sizes) == 2 and sizes[0] == sizes[1] and 2 <= sizes[0] <= MOST_MEMBERS:  # noqa: PLR2004
        return None
    found = f"{len(sizes)} domain{'s' * (len(sizes) != 1)} of {', '.join(map(str, sizes))} ranks"
    return f"ranks form {found}, not two of equal size with 2 to {MOST_MEMBERS} ranks each"


def unit_bytes(config: AllReduceConfig, algorithm: LowPrecisionAlgorithm) -> int:
    """What a packet takes of a slot: the ring's also hold its values as they are."""
    packet = PACKETS[config.low_precision.wire_format]
    return packet.values * LARGEST_ELEMENT if algorithm is LowPrecisionAlgorithm.RING else packet.bytes


def needs_flags(config: AllReduceConfig, facts: GroupFacts) -> bool:
    """Whether LOWPRECISION needs flagged slots in GPU memory; only in one or two steps in band it does without."""
    in_band = algorithm_of(config, facts).algorithm in (LowPrecisionAlgorithm.ONE_SHOT, LowPrecisionAlgorithm.TWO_SHOT)
    return not (in_band and config.low_precision.wire_format.goes_in_band)


def _slots_obstacle(config: AllReduceConfig, facts: GroupFacts, algorithm: LowPrecisionAlgorithm) -> str | None:
    """Why the workspace has no slots for this algorithm, or None; no obstacle before there is a workspace."""
    if facts.lanes == 0:
        return None
    needed, size = unit_bytes(config, algorithm), facts.flagged.two_shot
    if size >= needed:
        return None
    return f"a slot of the workspace ({size} bytes, with flags) is smaller than {needed} bytes"


def _one_shot_obstacle(config: AllReduceConfig, facts: GroupFacts) -> str | None:
    """Why packets cannot travel in one step, or None."""
    if not (wire_format := config.low_precision.wire_format).goes_in_band:
        in_band = " and ".join(wire for wire in WireFormat if wire.goes_in_band)
        return f"one step is for {in_band}, not {wire_format}"
    if facts.transport is Transport.SHM:
        return "one step is for GPUs"
    if facts.transport is Transport.HOST and wire_format.keeps_rows:
        return f"through host memory one step is for small messages, and {wire_format} runs alike at every size"
    needed, size = PACKETS[wire_format].bytes, facts.in_band.one_shot
    if facts.lanes == 0 or size >= needed:
        return None
    return f"a slot of the workspace ({size} bytes, in band) is smaller than {needed} bytes"


def _obstacle(config: AllReduceConfig, facts: GroupFacts, algorithm: LowPrecisionAlgorithm) -> str | None:
    """Why an algorithm other than two_shot cannot run, or None."""
    if algorithm is LowPrecisionAlgorithm.ONE_SHOT:
        return _one_shot_obstacle(config, facts)
    if (wire_format := config.low_precision.wire_format).keeps_rows:
        return f"it makes the answer for a row depend on the rows beside it, which {wire_format} does not"
    slots = _slots_obstacle(config, facts, algorithm)
    if algorithm is LowPrecisionAlgorithm.RING:
        return slots
    domains, _ = domains_of(config, facts)
    return domains_obstacle(domains) or slots


def _hierarchical_pays(config: AllReduceConfig, facts: GroupFacts) -> Merit:
    """Whether the hierarchical algorithm should run where nobody asked for it."""
    wire_format = config.low_precision.wire_format
    if facts.transport is Transport.HOST:
        return Merit(pays=False, reason="through host memory only two_shot was compared with the exact kernels")
    if facts.transport is not Transport.SYMMETRIC:
        return Merit(pays=False, reason="hierarchical is for GPUs")
    if facts.nvlink:
        return Merit(pays=False, reason="NVLink seems to join all GPUs")
    if wire_format is not WireFormat.FP8:
        # 8 ranks, normal data, relative error (benchmarks/form_errors.json): TQ3 0.94 as a two-shot, 1.20 hierarchical;
        # HADAMARD2 0.43 and 0.51.
        return Merit(pays=False, reason=f"{wire_format} loses too much where partial sums are encoded once more")
    return Merit(pays=True)


def algorithm_of(config: AllReduceConfig, facts: GroupFacts) -> AlgorithmChoice:
    """The algorithm for a group.

    Total. Before the group has a workspace (``facts.lanes == 0``), what the workspace should be made for.
    """
    asked = config.low_precision.algorithm
    if facts.crosses_network:
        between = "sums are compressed where they travel between hosts, and nowhere else"
        other = asked not in {LowPrecisionAlgorithm.AUTO, LowPrecisionAlgorithm.TWO_SHOT}
        why = f"{asked} cannot run over a network: {between}" if other else between
        return AlgorithmChoice(LowPrecisionAlgorithm.TWO_SHOT, why, is_fallback=other)
    two_shot, hierarchical = LowPrecisionAlgorithm.TWO_SHOT, LowPrecisionAlgorithm.HIERARCHICAL
    domains, source = domains_of(config, facts)
    if asked is two_shot:
        return AlgorithmChoice(asked, "low_precision.algorithm is two_shot")
    if asked is not LowPrecisionAlgorithm.AUTO:
        if (reason := _obstacle(config, facts, asked)) is not None:
            return AlgorithmChoice(two_shot, f"{asked} cannot run: {reason}", is_fallback=True)
        return AlgorithmChoice(
            asked, f"low_precision.algorithm is {asked}", domains=domains if asked is hierarchical else ()
        )
    one_step = _one_shot_obstacle(config, facts)
    keeps_rows = config.low_precision.wire_format.keeps_rows
    always = ", at every size alike" if keeps_rows else ""
    if facts.world_size <= measured.ONE_STEP_RANKS and one_step is None:
        return AlgorithmChoice(
            LowPrecisionAlgorithm.ONE_SHOT,
            f"one_shot{always}: with {facts.world_size} ranks, one step sends no more than two, and rounds once less",
        )
    if keeps_rows:
        why = one_step or f"with {facts.world_size} ranks, one step sends more than two"
        return AlgorithmChoice(two_shot, f"two_shot{always}: {why}")
    # What does not pay is the better reason, where both speak against it.
    merit = _hierarchical_pays(config, facts)
    against = _obstacle(config, facts, hierarchical) if merit.pays else merit.reason
    if against is not None:
        return AlgorithmChoice(two_shot, f"two_shot rather than hierarchical: {against}")
    reason = f"hierarchical: without NVLink, ranks in two domains of {len(domains) // 2} ({source})"
    return AlgorithmChoice(hierarchical, reason, domains=domains)
