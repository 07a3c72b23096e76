"""``check_calls``: the first call that ranks make differently is told on each of them, with who passes what."""

from __future__ import annotations

import time

import pytest
import torch

from llm_allreduce_plugin import PeerTimeoutError, RankMismatchError
from llm_allreduce_plugin.measure.ranks import RankContext
from tests.support.forked import forked
from tests.support.short_waits import TIMEOUT_S, communicator


def _differ(context: RankContext, sizes: list[int], dtypes: list[str]) -> tuple[str, str]:
    group = communicator(context, check_calls=True)
    try:
        for call in range(36):
            ones = torch.ones(50 + call)
            assert torch.equal(group.all_reduce(ones), ones * context.world_size)
        mine = torch.ones(sizes[context.rank], dtype=getattr(torch, dtypes[context.rank]))
        with pytest.raises(RankMismatchError) as caught:
            group.all_reduce(mine)
        # A call that was not made has broken nothing.
        assert torch.equal(group.all_reduce(torch.ones(7)), torch.full((7,), float(context.world_size)))
        return type(caught.value).__name__, str(caught.value)
    finally:
        group.close()


@pytest.mark.parametrize(
    ("sizes", "dtypes", "text"),
    [
        ([100, 200, 100], ["bfloat16"] * 3, "ranks 0, 2 pass 100 bfloat16, rank 1 200 bfloat16"),
        ([100] * 3, ["bfloat16", "bfloat16", "float16"], "ranks 0, 1 pass 100 bfloat16, rank 2 100 float16"),
        ([1, 2, 3], ["float32"] * 3, "rank 0 passes 1 float32, rank 1 2 float32, rank 2 3 float32"),
    ],
)
def test_the_first_difference_has_a_name_on_every_rank(sizes: list[int], dtypes: list[str], text: str) -> None:
    with forked(3, _differ, sizes, dtypes) as ranks:
        for rank in range(3):
            ended = ranks.ended(rank, 60)
            assert ended.kind == "ok", ended
            kind, said = ended.value
            assert kind == "RankMismatchError"
            assert said == f"call 37: {text}. Every rank must make the same calls in the same order (check_calls)"


def _one_makes_no_call(context: RankContext) -> tuple[float, str]:
    group = communicator(context, check_calls=True)
    group.all_reduce(torch.ones(10))
    if context.rank == 1:
        time.sleep(5)
        return 0.0, ""
    began = time.monotonic()
    with pytest.raises(PeerTimeoutError) as caught:
        group.all_reduce(torch.ones(10))
    assert caught.value.peer == 1
    return time.monotonic() - began, str(caught.value)


def test_a_rank_that_makes_no_call_is_named() -> None:
    with forked(2, _one_makes_no_call) as ranks:
        seconds, text = ranks.ended(0, 30).value
        assert TIMEOUT_S <= seconds < TIMEOUT_S + 1.2
        assert text.startswith("rank 0 waited 1")
        assert "s before a call for rank 1 to compare call 2; see its log (check_calls)" in text
