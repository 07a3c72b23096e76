"""What LOWPRECISION over two domains computes: the oracle of csrc/{cpu,kernels}/hierarchical_flags.*."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.oracle.sums import limited, own_values, part_of_values


def hierarchical_sum(
    inputs: Sequence[torch.Tensor], wire: WireFormat, domains: Sequence[int], chunk_packets: int | None = None
) -> torch.Tensor:
    """The compressed all-reduce over two domains: a sum within each, of which the encoded ones are added up.

    Args:
        inputs: one tensor per rank, alike in shape, dtype and device.
        wire: what travels.
        domains: a number for each rank; two different ones, equally often.
        chunk_packets: packets that one owner of a domain after another has, in turns; default: an equal share.

    Returns:
        What every rank gets, like an input.
    """
    codec = CODECS[wire]
    flat = [part.reshape(-1) for part in inputs]
    count, device = flat[0].numel(), flat[0].device
    first = [rank for rank, domain in enumerate(domains) if domain == domains[0]]
    second = [rank for rank, domain in enumerate(domains) if domain != domains[0]]
    owner = part_of_values(count, codec.packet_values, len(first), chunk_packets, device)
    total = torch.zeros(count, device=device)
    for members in (first, second):
        partial = torch.zeros(count, device=device)
        for index, rank in enumerate(members):
            partial = partial + torch.where(owner == index, own_values(flat[rank], wire), codec.round_trip(flat[rank]))
        total = total + codec.round_trip(limited(partial, wire))
    return (codec.round_trip(limited(total, wire)) + 0.0).to(inputs[0].dtype).view(inputs[0].shape)
