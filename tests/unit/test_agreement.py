"""Ranks must agree; a mismatch names the field and the ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig, PeerTimeoutError, RankMismatchError
from llm_allreduce_plugin.group import cards


def card(**settings: object) -> cards.RankCard:
    return cards.RankCard.of_this_rank(AllReduceConfig(**settings), torch.device("cpu"))  # type: ignore[arg-type]


def test_equal_cards_pass() -> None:
    cards.check([card(), card(), card()])


def test_settings_must_be_equal() -> None:
    with pytest.raises(RankMismatchError, match=r"timeout_s: 60\.0 on ranks 0, 2; 5\.0 on rank 1"):
        cards.check([card(), card(timeout_s=5), card()])
    with pytest.raises(RankMismatchError, match=r"allreduce_strategy: 'AUTO' on rank 0; 'NCCL' on rank 1"):
        cards.check([card(), card(allreduce_strategy="NCCL")])


@pytest.mark.parametrize(
    ("field", "value"), [("plugin_version", "9.9"), ("abi_version", 99), ("architecture", 80), ("device", "cuda")]
)
def test_capabilities_must_be_equal(field: str, value: object) -> None:
    other = dataclasses.replace(card(), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(RankMismatchError, match=f"ranks disagree about {field}"):
        cards.check([card(), other])


def test_where_a_rank_writes_may_differ() -> None:
    cards.check([card(report_dir="/a"), card(report_dir="/b")])


def test_timeout_error_reads_like_the_promise() -> None:
    error = PeerTimeoutError(rank=1, peer=3, strategy="ONESHOT", phase="gather", waited_s=60.0012)
    assert str(error) == "rank 1 waited 60 s for rank 3 in ONESHOT/gather"
    assert isinstance(error, TimeoutError)
