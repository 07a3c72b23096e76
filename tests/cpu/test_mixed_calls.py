"""Many calls of several communicators of one group, mixed at random: not a bit may differ.

``ALLREDUCE_TEST_MIXED_CALLS=2600000`` makes so many; few are made otherwise.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from llm_allreduce_plugin.measure.ranks import RankContext
from tests.conftest import PoolFor
from tests.support.reference import DTYPES, bits, rank_input, rank_ordered_sum

CALLS = int(os.environ.get("ALLREDUCE_TEST_MIXED_CALLS", "20000"))
SIZES = (0, 1, 7, 8, 100, 1000, 4099, 70_001)
# Strategies, and a workspace so small that most messages take several rounds.
KINDS: dict[str, dict[str, int]] = {
    "ONESHOT": {},
    "TWOSHOT": {},
    "AUTO": {},
    "TWOSHOT small": {"workspace_bytes": 2 << 20},
}
MOST_CALLS = 50_000  # in one turn


def _calls(context: RankContext, seed: int, calls: int) -> int:
    draw = random.Random(seed)
    cases = []
    for size in SIZES:
        for dtype in DTYPES:
            inputs = [rank_input(seed + size, rank, size, dtype) for rank in range(context.world_size)]
            cases.append((inputs[context.rank], bits(rank_ordered_sum(inputs))))
    groups = [
        context.communicator(kind.split()[0], tuning_profile="none", **settings) for kind, settings in KINDS.items()
    ]
    wrong = 0
    weights = [1 / (1 + mine.numel()) ** 0.3 for mine, _ in cases]
    for mine, expected in draw.choices(cases, weights, k=calls):
        output = groups[draw.randrange(len(groups))].all_reduce(mine)
        wrong += not torch.equal(bits(output), expected)
    for group in groups:
        group.close()
    return sum(context.gather(wrong))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world_size", (2, 3))
def test_mixed_calls_keep_every_bit(cpu_pool: PoolFor, world_size: int) -> None:
    done = 0
    while done < CALLS // 2:
        calls = min(MOST_CALLS, CALLS // 2 - done)
        seed = random.SystemRandom().randrange(1 << 20)
        assert cpu_pool(world_size).run(_calls, seed, calls, timeout_s=1200) == [0] * world_size, f"seed {seed}"
        done += calls
