"""What LOWPRECISION computes, in plain torch: the oracle of csrc/cpu/low_precision.cpp and of the accuracy report."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_allreduce_plugin.codecs import CODECS
from llm_allreduce_plugin.config import WireFormat


def compressed_sum(inputs: Sequence[torch.Tensor], wire: WireFormat, chunk_packets: int | None = None) -> torch.Tensor:
    """The compressed two-shot all-reduce: owners add what they decode to their own values, and all decode the sum.

    Args:
        inputs: one tensor per rank, alike in shape, dtype and device.
        wire: what travels.
        chunk_packets: packets that one owner after another has, in turns; default: an equal part for each rank.

    Returns:
        What every rank gets, like an input.
    """
    codec, world_size = CODECS[wire], len(inputs)
    flat = [part.reshape(-1) for part in inputs]
    count = flat[0].numel()
    packets = -(-count // codec.packet_values)
    chunk = chunk_packets or max(1, -(-packets // world_size))
    owners = (torch.arange(packets, device=flat[0].device) // chunk % world_size).repeat_interleave(
        codec.packet_values
    )[:count]
    sends_infinity = wire is WireFormat.TQ3
    total = torch.zeros(count, device=flat[0].device)
    for rank, part in enumerate(flat):
        exact = part.float()
        if not sends_infinity:
            exact = torch.where(exact.isfinite(), exact, float("nan"))
        total = total + torch.where(owners == rank, exact, codec.round_trip(part))
    if not sends_infinity:
        # Only finite values that were too large to add up are infinite here.
        total = torch.where(total.isinf(), total.sign() * torch.finfo(torch.float32).max, total)
    return (codec.round_trip(total) + 0.0).to(inputs[0].dtype).view(inputs[0].shape)


def exact_sum(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the exact strategies compute: fp32, ranks in order, from +0, rounded once."""
    total = torch.zeros(inputs[0].shape)
    for part in inputs:
        total = total + part.float()
    return total.to(inputs[0].dtype)
