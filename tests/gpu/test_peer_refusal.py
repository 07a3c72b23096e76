"""NCCL_P2P_DISABLE on GPUs: no rank touches its peers' memory, and all decide alike."""

from __future__ import annotations

import os

import pytest
import torch

from llm_allreduce_plugin.measure.answers import make_case
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.topology.links import Transport
from tests.conftest import PoolFor
from tests.support.reference import assert_same_bits

pytestmark = pytest.mark.gpu(2, per_rank=True)


def check_refusal(context: RankContext, ranks: tuple[int, ...]) -> None:
    if context.rank in ranks:
        os.environ["NCCL_P2P_DISABLE"] = "1"
    try:
        for transport, expected in (("auto", Transport.HOST), ("peer", Transport.SYMMETRIC), ("host", Transport.HOST)):
            group = context.communicator("MINLATENCY", transport=transport)
            assert group.facts.transport is expected
            mine, sum_ = make_case(context, 30_000, torch.bfloat16)
            assert_same_bits(group.all_reduce(mine), sum_.cpu(), f"transport {transport}")
            group.close()
    finally:
        os.environ.pop("NCCL_P2P_DISABLE", None)


@pytest.mark.parametrize("ranks", ((0, 1), (1,), (0,)), ids=("all", "the second", "the first"))
@pytest.mark.parametrize("world_size", (2,))
def test_host_memory_where_one_rank_refuses(gpu_pool: PoolFor, world_size: int, ranks: tuple[int, ...]) -> None:
    gpu_pool(world_size).run(check_refusal, ranks)
