"""LOWPRECISION's algorithms on GPUs of their own, one process each, through the communicator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.measure.ranks import RankContext
from tests.conftest import PoolFor
from tests.support import checks
from tests.support.low_precision import ANY_OWNER, DOMAINS, assert_same_numbers, expected_sum
from tests.support.reference import digest, rank_input

pytestmark = pytest.mark.gpu(2, per_rank=True)

KERNELS = {
    "two_shot": Algorithm.TWO_SHOT,
    "ring": Algorithm.RING,
    "hierarchical": Algorithm.HIERARCHICAL,
}


def _check(context: RankContext, transport: str, form: dict[str, Any]) -> None:
    digests = []
    for wire in ANY_OWNER:
        settings = {"wire_format": wire, "min_bytes": 0, **form}
        with checks.communicator(context, "LOWPRECISION", transport=transport, low_precision=settings) as group:
            for size in (1, 1025, 300_001, 8 << 20):
                launch = group.explain((size,), torch.bfloat16).launch
                assert launch is not None
                assert launch.algorithm is KERNELS[form["algorithm"]]
                seed = context.shared_seed()
                inputs = [rank_input(seed, rank, size, torch.bfloat16) for rank in range(context.world_size)]
                mine = inputs[context.rank].to(context.device)
                with checks.poisoned_outputs():
                    output = group.all_reduce(mine).cpu()
                assert_same_numbers(output, expected_sum(launch, inputs), f"{wire} x {size}, seed {seed}")
                for _ in range(20):  # calls on each other's heels
                    digests.append(digest(group.all_reduce(mine)))
                    assert digests[-1] == digest(output)
    everyone = context.gather(digests)
    assert all(other == everyone[0] for other in everyone), "ranks differ"


@pytest.mark.parametrize("transport", ("peer", "host"))
@pytest.mark.parametrize(
    ("world_size", "form"),
    [
        (2, {"algorithm": "ring"}),
        (4, {"algorithm": "ring"}),
        (4, {"algorithm": "hierarchical", "domains": DOMAINS["2+2"]}),
        (4, {"algorithm": "hierarchical", "domains": DOMAINS["2+2 in turns"]}),
        (8, {"algorithm": "ring"}),
        (8, {"algorithm": "hierarchical", "domains": DOMAINS["4+4"]}),
    ],
)
def test_forms(gpu_pool: PoolFor, world_size: int, form: dict[str, Any], transport: str) -> None:
    gpu_pool(world_size).run(_check, transport, form)
