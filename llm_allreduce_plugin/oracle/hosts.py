"""The sum over several hosts, in plain torch: the oracle of csrc/{cpu,kernels}/hosts_flags.*."""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
