"""Several hosts on one: their identity injected as NCCL_HOSTID, and inputs that tell orders of summation apart."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from llm_allreduce_plugin import TensorParallelCommunicator
from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.measure.ranks import RankContext
from tests.support.reference import rank_ordered_sum

TWO_OF_TWO = (0, 0, 1, 1)  # the host of each rank
# A value beside which the other is lost in fp32, both exact in the type.
_LARGE_AND_SMALL = {
    torch.float32: (2.0**25, 1.0),
    torch.float16: (2.0**15, 2.0**-10),
    torch.bfloat16: (2.0**25, 1.0),
}


def telling_inputs(seed: int, world_size: int, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """One tensor per rank. In each element two ranks cancel, and what others add to one of them before is lost."""
    large, small = _LARGE_AND_SMALL[dtype]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-9, 10, (world_size, count), generator=generator).float() * small
    one = torch.randint(world_size, (1, count), generator=generator)
    cancels = torch.rand(1, count, generator=generator) < 0.7  # the others are small all over
    values.scatter_(0, one, torch.where(cancels, large, values.gather(0, one)))
    if world_size > 1:
        other = (one + torch.randint(1, world_size, (1, count), generator=generator)) % world_size
        values.scatter_(0, other, torch.where(cancels, -large, values.gather(0, other)))
    # Larger than the 11 bits of fp16, so that rounding early shows.
    return list((values * torch.where(cancels, 1.0, 257.0 / 2)).to(dtype))


@contextlib.contextmanager
def on_host(hosts: Sequence[int], context: RankContext) -> Iterator[None]:
    """This rank runs on its host."""
    with mock.patch.dict(os.environ, {"NCCL_HOSTID": f"host-{hosts[context.rank]}"}):
        yield


@contextlib.contextmanager
def communicator(
    context: RankContext, hosts: Sequence[int], strategy: str, **settings: Any
) -> Iterator[TensorParallelCommunicator]:
    """One of ranks on these hosts."""
    with on_host(hosts, context):
        made = context.communicator(strategy, **settings)
    try:
        yield made
    finally:
        made.close()


def sum_of_host(inputs: Sequence[torch.Tensor], hosts: Sequence[int], host: int) -> torch.Tensor:
    """Of its ranks in order, fp32."""
    return rank_ordered_sum([part.float() for part, where in zip(inputs, hosts, strict=True) if where == host])


def set_piece_bytes(_context: RankContext, size: int) -> None:
    """On a rank of a pool: of a message in pieces."""
    measured.NETWORK_PIECE_BYTES = size
