"""What the oracles of LOWPRECISION's forms share: how a rank's own values and sums of decoded ones count."""

from __future__ import annotations

import torch

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle import CODECS


def sends_infinity(wire: WireFormat) -> bool:
    """Whether infinities arrive as such; in the other formats they arrive as NaN."""
    return wire is WireFormat.TQ3


def own_values(values: torch.Tensor, wire: WireFormat) -> torch.Tensor:
    """A rank's own values, fp32, as they count beside decoded ones."""
    if wire.keeps_rows:
        return CODECS[wire].round_trip(values)
    values = values.float()
    return values if sends_infinity(wire) else torch.where(values.isfinite(), values, float("nan"))


def limited(total: torch.Tensor, wire: WireFormat) -> torch.Tensor:
    """A sum: where infinities arrive as NaN, one of finite values that were too large to add up stays finite."""
    if sends_infinity(wire):
        return total
    return torch.where(total.isinf(), total.sign() * torch.finfo(torch.float32).max, total)


def part_of_values(
    count: int, packet_values: int, parts: int, chunk_packets: int | None, device: torch.device
) -> torch.Tensor:
    """Which of ``parts`` each of ``count`` values belongs to, int64 ``[count]``.

    ``chunk_packets``: packets that one part after another has, in turns; None: an equal share for each part.
    """
    packets = -(-count // packet_values)
    chunk = chunk_packets or max(1, -(-packets // parts))
    return (torch.arange(packets, device=device) // chunk % parts).repeat_interleave(packet_values)[:count]
