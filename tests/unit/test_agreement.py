"""Ranks must agree; a mismatch names the field and the ranks."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from torch.distributed import HashStore

from llm_allreduce_plugin import AllReduceConfig, PeerTimeoutError, RankMismatchError, StartError
from llm_allreduce_plugin.base.pickled import dump
from llm_allreduce_plugin.base.step import GivenUp, Step
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


@pytest.mark.parametrize(("field", "value"), [("plugin_version", "9.9"), ("abi_version", 99), ("device", "cuda")])
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


class _FailingPeer:
    """An agreement of ranks 0 and 1, of which rank 1 fails just when rank 0 has looked for its value in vain.

    ``comes``: it had set its value before, and failed in what comes behind the step.
    """

    rank, wait_s, setting, when, word_key = 0, 5.0, "start_timeout_s", "at the start", "word"

    def __init__(self, *, comes: bool) -> None:
        self._comes = comes
        self._store = HashStore()

    def open_store(self) -> _FailingPeer:
        return self

    def set(self, key: str, value: object) -> None:
        self._store.set(key, value)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        return self._store.get(key)

    def check(self, keys: list[str]) -> bool:
        there = self._store.check(keys)
        if keys == ["step/1"] and not self._store.check([self.word_key]):
            if self._comes:
                self.set("step/1", dump("one"))
            word = GivenUp(1, "", 0.0, [], time.time(), "ConfigError: no")
            self.set(self.word_key, json.dumps(dataclasses.asdict(word)))
        return there


def test_who_fails_behind_a_step_has_taken_it() -> None:
    """All ranks meet the same fault there, each by itself: none hears of another's instead."""

    def step(*, comes: bool) -> list[object]:
        agreement = _FailingPeer(comes=comes)
        return Step(agreement, lambda *_: dump("zero"), range(2), "to begin", "step", 0.0).values()  # type: ignore[arg-type]

    assert step(comes=True) == ["zero", "one"]
    with pytest.raises(StartError, match="^rank 1 failed at the start: ConfigError: no$"):
        step(comes=False)
