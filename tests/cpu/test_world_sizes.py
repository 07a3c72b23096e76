"""Numbers of ranks beyond those of one node, through the public API: processes over shared memory.

``ALLREDUCE_TEST_LARGEST_GROUP=24`` (up to 72) adds a group of so many.
"""

from __future__ import annotations

import os

import pytest
import torch

from llm_allreduce_plugin import AllReduceStrategy
from llm_allreduce_plugin.measure.ranks import RankContext
from tests.support import checks
from tests.support.forked import forked
from tests.support.reference import digest, fresh_seed, rank_input

WORLD_SIZES = (9, 12)
LARGEST = int(os.environ.get("ALLREDUCE_TEST_LARGEST_GROUP", "0"))
SIZES = (1, 13, 4099, 70_001)
DTYPES = (torch.bfloat16, torch.float32)


def _reduce(context: RankContext, seed: int) -> list[str]:
    """Every strategy and size against the sum in rank order; what the outputs are, so that ranks can be compared."""
    digests = []
    for strategy in ("ONESHOT", "TWOSHOT", "AUTO"):
        with checks.communicator(context, strategy, workspace_bytes=2 << 20, timeout_s=60.0) as group:
            for size in SIZES:
                decision = group.explain((size,), torch.bfloat16)
                assert decision.strategy is not AllReduceStrategy.NCCL, decision
                assert strategy in ("AUTO", decision.strategy), decision
                for dtype in DTYPES:
                    inputs = [rank_input(seed + size, rank, size, dtype) for rank in range(context.world_size)]
                    what = f"seed {seed}: {strategy}, {size} {dtype}, {context.world_size} ranks"
                    digests.append(digest(checks.reduce_and_compare(context, group, inputs, what)))
            ran = {str(group.explain((size,), kind).strategy) for size in SIZES for kind in DTYPES}
            assert group.report()["calls"].keys() == ran
    return digests


@pytest.mark.parametrize("world_size", [*WORLD_SIZES, *([LARGEST] if LARGEST else [])])
def test_ranks_agree_with_the_sum_in_rank_order(world_size: int) -> None:
    with forked(world_size, _reduce, fresh_seed()) as ranks:
        found = [ranks.value(rank, 100) for rank in range(world_size)]
    assert found == [found[0]] * world_size
    per_strategy = len(SIZES) * len(DTYPES)
    assert found[0][:per_strategy] == found[0][per_strategy : 2 * per_strategy], "ONESHOT and TWOSHOT"
