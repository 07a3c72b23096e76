"""What calls that go by multicast must give."""

from __future__ import annotations

import torch

from tests.support.reference import assert_same_bits, bits, rank_ordered_sum
from tests.support.soft_switch import MulticastGroup


def compare_exact(group: MulticastGroup, algorithm: str, inputs: list[torch.Tensor], what: str) -> None:
    """The bits of the sum in rank order, on every rank."""
    expected = rank_ordered_sum(inputs)
    for rank, output in enumerate(group.all_reduce(algorithm, inputs)):
        assert_same_bits(output, expected, f"{algorithm} {what}, rank {rank} of {group.world_size}")


def compare_in_switch(group: MulticastGroup, inputs: list[torch.Tensor], what: str) -> None:
    """On every rank the same, and of each element the sum in one of the orders that the emulated switch has."""
    turned = [rank_ordered_sum([*inputs[first:], *inputs[:first]]) for first in range(len(inputs))]
    possible = torch.stack([bits(part + 0.0) for part in turned])  # a zero is +0
    outputs = group.all_reduce("IN_SWITCH", inputs)
    for rank, output in enumerate(outputs):
        assert_same_bits(output, outputs[0], f"{what}, rank {rank} and rank 0")
    wrong = ~(possible == bits(outputs[0] + 0.0)).any(0)
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are no sum in any order"
