"""Which of LOWPRECISION's algorithms runs in a group, and why. Pure, like the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.config import LowPrecisionAlgorithm, WireFormat
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.wire import PACKETS

MOST_MEMBERS = 4  # ranks of a domain
LARGEST_ELEMENT = ELEMENT_BYTES["bfloat16"]  # what is halved and more is 16 bits to begin with


@dataclasses.dataclass(frozen=True)
class Form:
    """One of the algorithms.

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


def domains_of(facts: GroupFacts) -> tuple[tuple[int, ...], str]:
    """The domain of each rank, and where that comes from; empty when nobody knows."""
    if facts.low_precision.domains is not None:
        return facts.low_precision.domains, "low_precision.domains"
    return facts.domains, "NUMA nodes"


def domains_obstacle(domains: Sequence[int]) -> str | None:
    """Why ranks do not form two domains of equal size, of 2 to 4 ranks each, or None."""
    if not domains:
        return "the NUMA node of every rank's GPU is not known (low_precision.domains can tell)"
    sizes = [domains.count(domain) for domain in dict.fromkeys(domains)]
    if len(sizes) == 2 and sizes[0] == sizes[1] and 2 <= sizes[0] <= MOST_MEMBERS:  # noqa: PLR2004
        return None
    found = f"{len(sizes)} domain{'s' * (len(sizes) != 1)} of {', '.join(map(str, sizes))} ranks"
    return f"ranks form {found}, not two of equal size with 2 to {MOST_MEMBERS} ranks each"


def unit_bytes(facts: GroupFacts, algorithm: LowPrecisionAlgorithm) -> int:
    """What a packet takes of a slot: the ring's also hold its values as they are."""
    packet = PACKETS[facts.low_precision.wire_format]
    return packet.values * LARGEST_ELEMENT if algorithm is LowPrecisionAlgorithm.RING else packet.bytes


def needs_flags(facts: GroupFacts) -> bool:
    """Whether LOWPRECISION needs flagged slots in GPU memory; only FP8 as a two-shot does without."""
    two_shot = form_of(facts).algorithm is LowPrecisionAlgorithm.TWO_SHOT
    return not (two_shot and facts.low_precision.wire_format is WireFormat.FP8)


def _slots_obstacle(facts: GroupFacts, algorithm: LowPrecisionAlgorithm) -> str | None:
    """Why the workspace has no slots for this algorithm, or None; no obstacle before there is a workspace."""
    if facts.lanes == 0:
        return None
    needed, size = unit_bytes(facts, algorithm), facts.flagged.two_shot
    if size >= needed:
        return None
    return f"a slot of the workspace ({size} bytes, with flags) is smaller than {needed} bytes"


def form_of(facts: GroupFacts) -> Form:
    """The algorithm for a group.

    Total. Before the group has a workspace (``facts.lanes == 0``), what the workspace should be made for.
    """
    asked = facts.low_precision.algorithm
    domains, source = domains_of(facts)
    name = LowPrecisionAlgorithm.HIERARCHICAL
    obstacle: str | None
    if asked is LowPrecisionAlgorithm.TWO_SHOT:
        return Form(asked, "low_precision.algorithm is two_shot")
    if asked is LowPrecisionAlgorithm.RING:
        name = asked
        obstacle = _slots_obstacle(facts, asked)
    else:
        obstacle = domains_obstacle(domains) or _slots_obstacle(facts, name)
    if asked is not LowPrecisionAlgorithm.AUTO:
        if obstacle is not None:
            return Form(LowPrecisionAlgorithm.TWO_SHOT, f"{asked} cannot run: {obstacle}", is_fallback=True)
        reason = f"low_precision.algorithm is {asked}"
        return Form(asked, reason, domains=domains if asked is LowPrecisionAlgorithm.HIERARCHICAL else ())
    if facts.transport is Transport.HOST:
        obstacle = "through host memory only two_shot was compared with the exact kernels"
    elif facts.transport is not Transport.SYMMETRIC:
        obstacle = "hierarchical is for GPUs"
    elif facts.nvlink:
        obstacle = "NVLink joins all GPUs, as far as is known"
    elif facts.low_precision.wire_format is not WireFormat.FP8:
        # 8 ranks, normal data, relative error (benchmarks/form_errors.json): TQ3 0.94 as a two-shot, 1.20 hierarchical;
        # HADAMARD2 0.43 and 0.51.
        obstacle = f"{facts.low_precision.wire_format} loses too much where partial sums are encoded once more"
    if obstacle is not None:
        return Form(LowPrecisionAlgorithm.TWO_SHOT, f"two_shot rather than hierarchical: {obstacle}")
    reason = f"hierarchical: without NVLink, ranks in two domains of {len(domains) // 2} ({source})"
    return Form(name, reason, domains=domains)
