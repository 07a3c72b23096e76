"""What a format that keeps rows promises: the answer for a row has the same bits whatever rows are beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tests.support.reference import assert_same_bits

HIDDEN = (2880, 4096, 7168, 8192)
ROWS = 12  # different ones, of which batches are made


def rows_of(seed: int, rank: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A rank's ``[ROWS, hidden]``: rows of very different sizes, so that a scale of two rows shows in the smaller."""
    generator = torch.Generator().manual_seed(seed * 31 + rank)
    values = torch.randn(ROWS, hidden, generator=generator)
    values *= torch.exp2(torch.randint(-3, 4, values.shape, generator=generator).float())
    return (values * torch.exp2(torch.randint(-9, 5, (ROWS, 1), generator=generator).float())).to(dtype)


def check_rows(all_reduce: Callable[[torch.Tensor], torch.Tensor], batches: Sequence[int], seed: int, what: str) -> int:
    """Every row of every batch has the answer that it has alone; how many bytes were compared.

    Args:
        all_reduce: the sum ``[tokens, hidden]`` of a batch, which is told as ``[tokens]``: which of ROWS each is.
        batches: how many tokens each has.
        seed: which rows lie where.
        what: for the message.
    """
    alone = torch.cat([all_reduce(torch.tensor([row])).cpu() for row in range(ROWS)])
    generator = torch.Generator().manual_seed(seed)
    compared = 0
    for tokens in batches:
        index = torch.randint(ROWS, (tokens,), generator=generator)
        assert_same_bits(all_reduce(index), alone[index], f"{what}, a batch of {tokens}, {seed=}")
        compared += tokens * alone[0].nbytes
    return compared
