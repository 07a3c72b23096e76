"""benchmarks/soak.py on CPU ranks: every kind of call gives its bits, and one bit that is off is counted."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks.soak import KINDS, Soak
from llm_allreduce_plugin.measure.ranks import RankContext
from tests.conftest import PoolFor

LARGEST = 50_000


@contextmanager
def _opened(context: RankContext, kinds: Collection[str] = KINDS) -> Iterator[Soak]:
    soak = Soak(context, LARGEST, kinds)
    try:
        yield soak
    finally:
        soak.close()


def _every_kind(context: RankContext, seed: int) -> tuple[int, set[str]]:
    with _opened(context) as soak:
        generator, wrong = random.Random(seed), 0
        for _ in range(150):
            wrong += soak.step(generator)
        return sum(context.gather(wrong)), set(soak.counts)


def _one_bit_off(context: RankContext, name: str) -> int:
    with _opened(context, {name}) as soak:
        generator = random.Random(context.shared_seed())
        right = soak.compare

        def compare(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> int:
            if context.rank == 1:
                outputs[-1].view(torch.uint8).view(-1)[0] ^= 1
            return right(outputs, expected)

        soak.compare = compare  # type: ignore[method-assign]
        return sum(context.gather(soak.step(generator)))


def test_every_kind_of_call_gives_its_bits(cpu_pool: PoolFor) -> None:
    wrong, counts = cpu_pool(2).run(_every_kind, 7, timeout_s=120)[0]
    assert wrong == 0
    assert counts == {f"eager {name}" for name, kind in KINDS.items() if not kind.gpus}


@pytest.mark.parametrize("name", ("ONESHOT", "UB", "fp8", "norm"))
def test_a_bit_that_is_off_is_counted(cpu_pool: PoolFor, name: str) -> None:
    assert cpu_pool(2).run(_one_bit_off, name, timeout_s=60)[0] == 1
