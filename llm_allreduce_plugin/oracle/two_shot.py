"""What LOWPRECISION computes, in plain torch: the oracle of csrc/cpu/two_shot_flags.cpp and of the accuracy report."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.oracle.sums import limited, own_values, part_of_values


def compressed_sum(inputs: Sequence[torch.Tensor], wire: WireFormat, chunk_packets: int | None = None) -> torch.Tensor:
    """The compressed two-shot all-reduce: owners add what they decode to their own values, and all decode the sum.

    With a format that keeps rows, an owner's own values count as decoded, too.

    Args:
        inputs: one tensor per rank, alike in shape, dtype and device.
        wire: what travels.
        chunk_packets: packets that one owner after another has, in turns; default: an equal part for each rank.

    Returns:
        What every rank gets, like an input.
    """
    codec = CODECS[wire]
    flat = [part.reshape(-1) for part in inputs]
    count, device = flat[0].numel(), flat[0].device
    owners = part_of_values(count, codec.packet_values, len(inputs), chunk_packets, device)
    total = torch.zeros(count, device=device)
    for rank, part in enumerate(flat):
        total = total + torch.where(owners == rank, own_values(part, wire), codec.round_trip(part))
    return (codec.round_trip(limited(total, wire)) + 0.0).to(inputs[0].dtype).view(inputs[0].shape)


def exact_sum(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the exact strategies compute: fp32, ranks in order, from +0, rounded once."""
    total = torch.zeros(inputs[0].shape)
    for part in inputs:
        total = total + part.float()
    return total.to(inputs[0].dtype)
