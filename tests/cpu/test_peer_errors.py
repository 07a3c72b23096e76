"""What a rank hears of its peers: that it came too late for them, or that one of them has failed at the start."""

from __future__ import annotations

import contextlib
import re
import time
from typing import Any
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin import PeerTimeoutError, StartError
from llm_allreduce_plugin import TensorParallelCommunicator as Communicator
from llm_allreduce_plugin.group.cards import RankCard
from llm_allreduce_plugin.measure.ranks import RankContext
from tests.support.forked import forked
from tests.support.short_waits import TIMEOUT_S, communicator


def _call_for_ever(group: Communicator) -> None:
    while True:
        group.all_reduce(torch.ones(100))


def _comes_late(context: RankContext) -> str:
    group = communicator(context)
    group.all_reduce(torch.ones(100))
    if context.rank == 1:
        time.sleep(TIMEOUT_S + 1.5)  # in compilation, say
    with pytest.raises(PeerTimeoutError) as caught:
        _call_for_ever(group)
    if context.rank == 0:
        time.sleep(3)
    group.close()
    return str(caught.value)


def test_a_late_rank_hears_that_it_is_late() -> None:
    with forked(2, _comes_late) as ranks:
        on_time, late = (ranks.ended(rank, 30) for rank in (0, 1))
    assert on_time.value.startswith("rank 0 waited 1")
    assert on_time.value.endswith(" s for rank 1 in ONESHOT/gather")
    assert re.fullmatch(
        r"rank 1 came too late: rank 0 gave up [12]\.?\d* s ago, after it had waited 1\.?\d* s for rank 1 in "
        r"ONESHOT/gather",
        late.value,
    )


def _fails_at_start(context: RankContext) -> tuple[str, str, float]:
    began = time.monotonic()
    patch: Any = contextlib.nullcontext()
    if context.rank == 1:
        patch = mock.patch.object(RankCard, "of_this_rank", side_effect=OSError(24, "Too many open files"))
    with patch, pytest.raises((StartError, OSError)) as caught:
        communicator(context, start_timeout_s=30.0)
    return type(caught.value).__name__, str(caught.value), time.monotonic() - began


def test_a_rank_that_fails_at_the_start_ends_it_for_all() -> None:
    with forked(3, _fails_at_start) as ranks:
        for rank in range(3):
            kind, text, seconds = ranks.ended(rank, 30).value
            assert seconds < 5
            if rank == 1:
                assert (kind, text) == ("OSError", "[Errno 24] Too many open files")
            else:
                assert (kind, text) == (
                    "StartError",
                    "rank 1 failed at the start: OSError: [Errno 24] Too many open files",
                )
