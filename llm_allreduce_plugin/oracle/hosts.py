"""Sums over several hosts, exact and compressed between them, in plain torch: the oracle of csrc/*/hosts_flags.*."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle import CODECS

_LINE = 8  # elements, of which parts are multiples


def host_ordered_sum(inputs: Sequence[torch.Tensor], hosts: Sequence[int]) -> torch.Tensor:
    """Over the ranks of each host in order, then over hosts in order: fp32, each sum from +0, rounded once.

    Args:
        inputs: one tensor per rank, alike in shape, dtype and device.
        hosts: the host of each rank, from 0 on.

    Returns:
        What every rank gets, like an input.
    """
    total = torch.zeros(inputs[0].shape, dtype=torch.float32, device=inputs[0].device)
    for host in range(max(hosts) + 1):
        inside = torch.zeros_like(total)
        for part, where in zip(inputs, hosts, strict=True):
            if where == host:
                inside += part.float()
        total += inside
    return total.to(inputs[0].dtype)


def compressed_host_sum(
    inputs: Sequence[torch.Tensor], wire: WireFormat, hosts: Sequence[int], piece_elements: int | None = None
) -> torch.Tensor:
    """The same with the sum of each host, in fp32, encoded and decoded before hosts are summed: its own, too.

    A message is cut into pieces, those into a part for each rank of a host, and packets begin with each part.

    Args:
        inputs: one tensor per rank, alike in shape, dtype and device.
        wire: what travels between hosts.
        hosts: the host of each rank, from 0 on, with as many ranks each.
        piece_elements: of all pieces but the last; None: there is one.

    Returns:
        What every rank gets, like an input.
    """
    codec, ranks = CODECS[wire], list(hosts).count(0)
    count = inputs[0].numel()
    total = torch.zeros(count, dtype=torch.float32, device=inputs[0].device)
    piece = piece_elements or max(1, count)
    for host in range(max(hosts) + 1):
        inside = torch.zeros_like(total)
        for part, where in zip(inputs, hosts, strict=True):
            if where == host:
                inside += part.reshape(-1).float()
        for begin in range(0, count, piece):
            end = min(count, begin + piece)
            share = -(-(end - begin) // (ranks * _LINE)) * _LINE
            for first in range(begin, end, share):
                last = min(end, first + share)
                total[first:last] += codec.round_trip(inside[first:last])
    return total.to(inputs[0].dtype).view(inputs[0].shape)
