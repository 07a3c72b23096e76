"""Time of an all-reduce against link bandwidth, exact and compressed. Pure arithmetic.

A two-shot of S bytes of 16-bit values sends 2 (N-1)/N S per rank and direction. Compressed, it sends less by the
format's ratio, and every rank encodes its input but for its own part, and its part's sum, S in all, and decodes the
others' partials of its part and everybody's sums, (2 (N-1) + 1)/N S. Nothing is taken to overlap: the worst case for
compression. Latency is left out: this is about large messages.

Between hosts of R ranks each, a rank sends its part of the fp32 sums of its host, S/R values, to each other host, and
gets as much. Compressed, it encodes them once, and decodes what came of each host, its own, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.wire import PACKETS

VALUE_BYTES = 2
GIGA = 1e9

# The links that the proposal of TQ3 compared, GB/s per direction.
LINKS = {"NVLink": 600.0, "PCIe 4.0 x16": 32.0, "InfiniBand HDR": 25.0, "100 Gb Ethernet": 12.5}


@dataclasses.dataclass(frozen=True)
class CodecSpeed:
    """GB of 16-bit values that one device encodes or decodes in a second."""

    encode: float
    decode: float


def traffic(world_size: int) -> float:
    """Bytes that a two-shot sends per rank and direction, for each byte of the message."""
    return 2 * (world_size - 1) / world_size


def ratio(wire: WireFormat) -> float:
    """Bytes on the wire for each byte of 16-bit values."""
    packet = PACKETS[wire]
    return packet.bytes / (packet.values * VALUE_BYTES)


def codec_seconds(payload_bytes: float, world_size: int, speed: CodecSpeed) -> float:
    """What a rank spends on encoding and decoding."""
    decoded = traffic(world_size) + 1 / world_size
    return payload_bytes / GIGA * (1 / speed.encode + decoded / speed.decode)


def seconds(
    payload_bytes: float,
    world_size: int,
    bandwidth: float,
    wire: WireFormat | None = None,
    speed: CodecSpeed | None = None,
) -> float:
    """An all-reduce over links of ``bandwidth`` GB/s per direction; exact without ``wire``."""
    sent = traffic(world_size) * payload_bytes / GIGA / bandwidth
    if wire is None or speed is None:
        return sent
    return ratio(wire) * sent + codec_seconds(payload_bytes, world_size, speed)


def break_even(world_size: int, wire: WireFormat, speed: CodecSpeed) -> float:
    """The bandwidth in GB/s at which both take the same time; compression pays below it."""
    return (1 - ratio(wire)) * traffic(world_size) / codec_seconds(GIGA, world_size, speed)


SUM_BYTES = 4


def between_seconds(
    payload_bytes: float,
    hosts: int,
    ranks: int,
    bandwidth: float,
    wire: WireFormat | None = None,
    speed: CodecSpeed | None = None,
) -> float:
    """What goes between hosts, ``bandwidth`` GB/s to each GPU, for a message per rank; exact without ``wire``.

    Codecs take as many bytes of fp32 as of 16-bit values.
    """
    sums = payload_bytes / VALUE_BYTES / ranks * SUM_BYTES / GIGA
    sent = (hosts - 1) * sums / bandwidth
    if wire is None or speed is None:
        return sent
    coded = sums * (1 / speed.encode + hosts / speed.decode)
    return ratio(wire) * VALUE_BYTES / SUM_BYTES * sent + coded


def break_even_between(hosts: int, wire: WireFormat, speed: CodecSpeed) -> float:
    """The bandwidth between hosts, in GB/s to each GPU, below which compression pays, however many GPUs a host has."""
    saved = (1 - ratio(wire) * VALUE_BYTES / SUM_BYTES) * (hosts - 1)
    return saved / (1 / speed.encode + hosts / speed.decode)


def table(payload_bytes: float, world_size: int, speeds: Mapping[WireFormat, CodecSpeed], hosts: int = 2) -> str:
    """For people: microseconds on each link, and where each format breaks even, between hosts and inside one."""
    names = ["exact", *speeds]
    lines = [f"{'us for ' + f'{payload_bytes / 2**20:g} MiB':>24}" + "".join(f"{name:>12}" for name in names)]
    for link, bandwidth in LINKS.items():
        exact = seconds(payload_bytes, world_size, bandwidth)
        times = [exact, *(seconds(payload_bytes, world_size, bandwidth, *item) for item in speeds.items())]
        best = min(times)
        cells = [f"{time * 1e6:.0f}{'*' if time == best else ' '}" for time in times]
        lines.append(f"{f'{link}, {bandwidth:g} GB/s':>24}" + "".join(f"{cell:>12}" for cell in cells))
    between = [f"{break_even_between(hosts, wire, speed):.0f} " for wire, speed in speeds.items()]
    lines.append(f"{f'between {hosts} hosts, below':>24}{'':>12}" + "".join(f"{end:>12}" for end in between))
    ends = [f"{break_even(world_size, wire, speed):.0f} " for wire, speed in speeds.items()]
    lines.append(f"{'pays below, GB/s':>24}{'':>12}" + "".join(f"{end:>12}" for end in ends))
    return "\n".join(lines)
