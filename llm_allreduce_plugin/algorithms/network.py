"""Several hosts that a network joins: how a call is spread, and which of its two forms pays. Kernels: csrc/*/hosts_*.

Sums of each host, in fp32, are exchanged between ranks of equal place on their hosts, by an engine that moves bytes and
does no arithmetic; csrc/protocol/hosts.h has the steps. ONESHOT names the form in one step inside each host, in which
every rank sums and exchanges whole messages; TWOSHOT that in two, in which a rank does so with its part. Both give the
same bits: those of the ranks of each host in order, then hosts in order. LOWPRECISION is the form in two steps with
sums that are compressed on the network alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from llm_allreduce_plugin.algorithms import host_costs, measured
from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES, Message, spread
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.algorithms.host_costs import STEP_S, Network, inside_bytes_per_s, two_steps_pay_from
from llm_allreduce_plugin.algorithms.ranges import Range, Table
from llm_allreduce_plugin.config import AllReduceStrategy, WireFormat
from llm_allreduce_plugin.topology.links import TopologyClass, Transport

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.decision import Launch
    from llm_allreduce_plugin.algorithms.facts import GroupFacts

MOST_LANES = 128  # more blocks only add flags
PIECE_ELEMENTS = 64  # pieces begin on whole cache lines of every type


def in_words(algorithm: str, facts: GroupFacts, form: Algorithm) -> str:
    """What runs: ``algorithm`` inside one host, or the form of it over several."""
    if not facts.crosses_network:
        return algorithm
    share = "its share" if form is Algorithm.TWO_SHOT else "the whole message"
    then = ", and pushes the result inside the host" if form is Algorithm.TWO_SHOT else ""
    return (
        f"hierarchical over {facts.num_hosts} hosts, {form.in_words}: every rank sums {share} over its host in fp32, "
        f"ranks of equal place exchange those sums over the network, and each sums the hosts in order{then}"
    )


def compressed_in_words(facts: GroupFacts, wire: WireFormat) -> str:
    """What runs where sums are compressed between hosts."""
    return (
        f"hierarchical over {facts.num_hosts} hosts, two-shot, {wire} between them: every rank sums its share over its "
        "host in fp32, ranks of equal place exchange those sums compressed, and each sums the hosts in order, as "
        "decoded, and pushes the result inside the host"
    )


_LINK = Network(measured.NETWORK_BYTES_PER_S)


def _inside(facts: GroupFacts) -> float:
    """Bytes per second that a rank stores to its host's; unknown links count as an H200's, as elsewhere."""
    links = facts.topology_class
    return inside_bytes_per_s(TopologyClass.NVLINK if links is TopologyClass.UNKNOWN else links, facts.architecture)


def _modelled(facts: GroupFacts) -> str:
    hosts, ranks = facts.num_hosts, facts.local_size
    return f"modelled for {hosts} hosts of {ranks}, not measured: {measured.NETWORK_SOURCE}"


def table(facts: GroupFacts, element_bytes: int) -> Table:
    """From which size two steps beat one: what they save on the network, and inside, outweighs a second step."""
    hosts, ranks = facts.num_hosts, facts.local_size
    if ranks == 1:
        return Table((Range(None, AllReduceStrategy.ONESHOT),), "each host has one rank")
    largest = two_steps_pay_from(hosts, ranks, _LINK, _inside(facts), element_bytes)
    ranges = (Range(largest, AllReduceStrategy.ONESHOT), Range(None, AllReduceStrategy.TWOSHOT))
    return Table(ranges, f"{_modelled(facts)}, {STEP_S * 1e6:g} us for a second step inside the host")


def compression_pays_from(facts: GroupFacts, wire: WireFormat, element_bytes: int) -> tuple[int | None, str]:
    """From which size compressed sums are faster, in bytes per rank, and how that is known; None: from none."""
    hosts, ranks = facts.num_hosts, facts.local_size
    least = host_costs.compression_pays_from(hosts, ranks, _LINK, _inside(facts), wire, element_bytes)
    return least, f"{_modelled(facts)}, codecs as on an H100"


def pieces(message: Message) -> int:
    """Pieces of a message, of which one is on the network while others are summed."""
    return min(measured.NETWORK_MOST_PIECES, max(1, message.payload_bytes // measured.NETWORK_PIECE_BYTES))


def cuts(count: int, number: int) -> list[tuple[int, int]]:
    """First element and elements of each piece, at most ``number`` of them; all but the last are alike."""
    size = max(PIECE_ELEMENTS, math.ceil(math.ceil(count / number) / PIECE_ELEMENTS) * PIECE_ELEMENTS)
    return [(first, min(size, count - first)) for first in range(0, max(count, 1), size)]


def plan(facts: GroupFacts, message: Message, form: Algorithm) -> Launch:
    """How a call is spread, in either half: in both a rank sums or sends as much. Chunks are of a piece."""
    found = cuts(message.count, pieces(message))
    parts = facts.local_size if form is Algorithm.TWO_SHOT else 1
    vectors = math.ceil(found[0][1] * message.element_bytes / VECTOR_BYTES)
    slot = facts.flagged.one_shot
    if facts.transport is not Transport.SYMMETRIC:  # what differs by reader lies in one slot, one part after another
        slot //= parts
    launch = spread(vectors, form, slot, min(facts.lanes, MOST_LANES), parts)
    return dataclasses.replace(launch, hosts=facts.num_hosts, pieces=len(found))
