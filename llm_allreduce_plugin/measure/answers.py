"""How an answer is judged: what goes in, what must come out, and by how much that may be off."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.oracle.hosts import host_ordered_sum


def make_input(seed: int, rank: int, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``rank``'s input: normal data that every rank can make for every rank. Kept as small as the message."""
    generator = torch.Generator(device).manual_seed(seed * 128 + rank)  # more than ranks
    return torch.randn(count, generator=generator, device=device, dtype=torch.float32).to(dtype)


def rank_ordered_sum(seed: int, world_size: int, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What an exact all-reduce of :func:`make_input` gives: fp32, ranks in order, one rounding."""
    total = torch.zeros(count, dtype=torch.float32, device=device)
    for rank in range(world_size):
        total += make_input(seed, rank, count, dtype, device).float()
    return total.to(dtype)


def make_case(
    context: RankContext, count: int, dtype: torch.dtype, hosts: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's input from a fresh seed, and what an exact all-reduce gives. Collective.

    ``hosts``: the host of each rank, where a network joins them; sums are ordered by it.
    """
    seed, device = context.shared_seed(), context.device
    mine = make_input(seed, context.rank, count, dtype, device)
    if len(set(hosts)) > 1:
        inputs = [make_input(seed, rank, count, dtype, device) for rank in range(context.world_size)]
        return mine, host_ordered_sum(inputs, hosts)
    return mine, rank_ordered_sum(seed, context.world_size, count, dtype, device)


def wrong_elements(output: torch.Tensor, expected: torch.Tensor, *, exact: bool, world_size: int) -> int:
    """Elements that are not what they must be.

    Exact implementations must give the very bits. Others (another order of additions, a sum kept in 16 bits) may be
    off by what rounding each of the ``world_size`` additions may cost.
    """
    output, expected = output.reshape(-1), expected.reshape(-1)
    if exact:
        word = {2: torch.int16, 4: torch.int32}[output.element_size()]
        return int((output.view(word) != expected.view(word)).sum())
    allowed = world_size * torch.finfo(expected.dtype).eps * (expected.float().abs() + world_size**0.5)
    return int(((output.float() - expected.float()).abs() > allowed).sum()) + int(output.isnan().sum())


# What each wire format may be off by on normal data.
MOST_ERROR = {wire: codec.most_error for wire, codec in CODECS.items()}
# Times that for the ring and over domains, which encode sums more often: with 8 ranks they have 1.2 to 1.5 times the
# error of the two-shot, by the oracles in oracle/.
MORE_ERROR = 1.7


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of ``expected``; infinite when the output is not finite."""
    difference = float((output.float() - expected.float()).norm() / expected.float().norm())
    return difference if difference == difference else float("inf")  # noqa: PLR0124


def digest(output: torch.Tensor) -> int:
    """A number that differs, in all likelihood, when the bits of two outputs do."""
    word = {2: torch.int16, 4: torch.int32}[output.element_size()]
    words = output.reshape(-1).view(word).to(torch.int64)
    places = torch.arange(1, words.numel() + 1, device=output.device) * 0x9E3779B97F4A7C1
    return int((words * places).sum())
