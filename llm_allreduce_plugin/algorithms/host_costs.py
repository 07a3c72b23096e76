"""What an all-reduce over hosts that a network joins should take: a model, not measured anywhere. Pure arithmetic.

Sums of each host, in fp32 or compressed, are exchanged between ranks of equal place on their hosts:

* in one step, every rank sums the whole message of its host and exchanges all of it;
* in two, a rank sums and exchanges its part of it, and the results are gathered inside the host;
* in pieces, the network and the links inside the host work at the same time, on different pieces.

Latencies are those of kernels and of NCCL's send and receive as known from elsewhere. :func:`codec_seconds` is what
codecs take on top: one pass for what a rank sends, one for what it gets of each host.
"""

from __future__ import annotations

import dataclasses

from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.algorithms.link_scale import link_scale
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.topology.links import TopologyClass
from llm_allreduce_plugin.wire import FORMATS_BETWEEN_HOSTS, PACKETS

SUM_BYTES = 4  # of an element of a partial sum: fp32
MOST_BYTES = 1 << 30  # of a message that is looked at
# Stores to peers, per GPU and direction: H200's through NVLink, of which others are scaled; and 64 MiB over eight L40S
# behind PCIe 4.0, all at once.
NVLINK_BYTES_PER_S = 360e9
PCIE_BYTES_PER_S = 20e9
STEP_S = 5e-6  # a step inside the host: a kernel and a barrier of its ranks
NETWORK_STEP_S = 10e-6  # NCCL's exchange of a small message between two hosts
ADD_S = 3e-6  # the kernel that sums over hosts
CODEC_STEP_S = 2e-6  # a kernel that encodes, or decodes what came of one host, in a graph
SOURCE = (
    f"{STEP_S * 1e6:g} us for a step inside a host, {NETWORK_STEP_S * 1e6:g} us for an exchange, "
    f"{ADD_S * 1e6:g} us for the sum over hosts"
)


@dataclasses.dataclass(frozen=True)
class Network:
    """What joins hosts.

    Attributes:
        bytes_per_s: per direction.
        of_host: all GPUs of a host share it; otherwise each GPU has as much.
    """

    bytes_per_s: float
    of_host: bool = False

    def per_gpu(self, ranks: int) -> float:
        """What each of so many GPUs of a host has when all send at once."""
        return self.bytes_per_s / ranks if self.of_host else self.bytes_per_s


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one message, in seconds.

    Attributes:
        one_step, two_steps: see above.
        in_pieces: two steps in ``pieces``.
        compressed: the same with sums that are compressed on the network alone, without the time of the codec.
    """

    one_step: float
    two_steps: float
    in_pieces: float
    pieces: int
    compressed: dict[WireFormat, float]

    @property
    def best(self) -> float:
        """The fastest exact form."""
        return min(self.one_step, self.two_steps, self.in_pieces)


def inside_bytes_per_s(links: TopologyClass, architecture: int | None) -> float:
    """What a GPU stores to peers of its host, per second; where nobody knows the links, as over PCIe."""
    if links not in {TopologyClass.NVSWITCH, TopologyClass.NVLINK}:
        return PCIE_BYTES_PER_S
    return NVLINK_BYTES_PER_S * link_scale(architecture, links)


def cost(hosts: int, ranks: int, payload_bytes: int, network: Network, inside: float, element_bytes: int = 2) -> Cost:
    """An all-reduce of ``payload_bytes`` per rank over ``hosts`` of ``ranks`` each.

    ``inside``: bytes per second that a GPU stores to peers of its host. Each rank sends its sums to as many ranks as
    there are other hosts.
    """
    elements = payload_bytes / element_bytes
    rate = network.per_gpu(ranks)
    half = payload_bytes * (ranks - 1) / ranks / inside  # a reduce-scatter's or a gather's bytes
    steps = 2 * STEP_S if ranks > 1 else 0.0
    sent = (hosts - 1) * elements / ranks * SUM_BYTES / rate
    one_step = STEP_S + payload_bytes * (ranks - 1) / inside + NETWORK_STEP_S + ranks * sent + ADD_S
    pieces = int(min(measured.NETWORK_MOST_PIECES, max(1, payload_bytes // measured.NETWORK_PIECE_BYTES)))

    def staged(network_s: float, number: int) -> float:
        # What is longer goes on all the time, and the first and last piece of the other have nothing to hide behind.
        longer, shorter = max(network_s, 2 * half), min(network_s, 2 * half)
        return steps + NETWORK_STEP_S + ADD_S + longer + shorter / number

    compressed = {
        wire: staged(sent / SUM_BYTES * PACKETS[wire].bytes / PACKETS[wire].values, pieces)
        for wire in FORMATS_BETWEEN_HOSTS
    }
    return Cost(one_step, staged(sent, 1), staged(sent, pieces), pieces, compressed)


def codec_seconds(hosts: int, ranks: int, elements: float, wire: WireFormat) -> float:
    """What a rank spends on encoding its part of ``elements`` fp32 sums, and on decoding those of all hosts.

    By the speeds on an H100 (``measured.CODEC_BYTES_PER_S``), which were measured with 16-bit values: of fp32 it takes
    as many bytes, half as many values.
    """
    encode, decode = measured.CODEC_BYTES_PER_S[wire]
    size = elements / ranks * SUM_BYTES
    return (1 + hosts) * CODEC_STEP_S + size / encode + hosts * size / decode


def compression_pays_from(
    hosts: int, ranks: int, network: Network, inside: float, wire: WireFormat, element_bytes: int = 2
) -> int | None:
    """The smallest message, in bytes per rank, from which on compressing between hosts is faster; None: there is none.

    To a part in a hundred, and no more than 1 GiB.
    """

    def pays(payload_bytes: int) -> bool:
        found = cost(hosts, ranks, payload_bytes, network, inside, element_bytes)
        return found.compressed[wire] + codec_seconds(hosts, ranks, payload_bytes / element_bytes, wire) < found.best

    if not pays(MOST_BYTES):
        return None
    low, high = 0, MOST_BYTES
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


def two_steps_pay_from(hosts: int, ranks: int, network: Network, inside: float, element_bytes: int = 2) -> int:
    """The smallest message, in bytes per rank, for which two steps beat one: they send less, there and inside."""
    if ranks == 1:
        return MOST_BYTES

    def saved(payload_bytes: int) -> float:
        found = cost(hosts, ranks, payload_bytes, network, inside, element_bytes)
        return found.one_step - found.two_steps

    # Both are proportional to bytes beside what a step costs.
    per_byte = (saved(2 << 10) - saved(1 << 10)) / (1 << 10)
    return max(1, min(MOST_BYTES, int((1 << 10) - saved(1 << 10) / per_byte)))
