"""Tuning of results that go into registered outputs, without ranks: what is asked for, and what the profile says."""

from __future__ import annotations

import time
import types
from typing import Any

import pytest

from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.bench import compare, worker
from llm_allreduce_plugin.bench.candidates import OurSettings
from llm_allreduce_plugin.bench.compare import Comparison
from llm_allreduce_plugin.profiles.entry import Entry
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.tuning.measure import GroupTuner
from llm_allreduce_plugin.tuning.plan import Group, WrongAnswerError, plan_of
from tests.support.group_facts import config, facts

KIB, MIB = 1024, 1 << 20
SIZES = tuple(1 << power for power in range(10, 27))
CROSSING = 300 * KIB  # of one-shot and two-shot
LEAST = 64 * KIB  # that UB takes


class MadeUpPool:
    """Ranks that are asked for times: TWOSHOT beats ONESHOT from ``CROSSING`` on, UB takes ``ub`` times TWOSHOT's."""

    def __init__(self, ub: float, wrong: int = 0) -> None:
        self._ub, self._wrong = ub, wrong
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def run(self, function: Any, *given: Any, ranks: list[int]) -> list[Comparison]:
        _world_size, names, count, _dtype, _effort = given
        assert function is compare.compare
        size = 2 * count
        self.asked.append((size, names))
        two_shot = 10.0 + size / CROSSING
        times = {"ONESHOT": 9.0 + 2 * size / CROSSING, "TWOSHOT": two_shot, "UB": self._ub * two_shot}
        measured = {name: times[name] for name in names if name != "UB" or size >= LEAST}
        wrong = {name: self._wrong if name == "UB" else 0 for name in measured}
        eager = {name: 30 + time_us for name, time_us in measured.items()}
        return [Comparison(size, measured, eager, 0.0, 0.0, wrong)] * len(ranks)


def tuned(pool: MadeUpPool, *, places: bool = True) -> Entry:
    tuner = GroupTuner(pool, Group(4, "bfloat16"), plan_of(SIZES, 10.0, quick=True), lambda _: None, places=places)  # type: ignore[arg-type]
    tuner.sweep()
    tuner.refine(time.monotonic() + 60)
    return tuner.entry(facts(4, in_band=True), {}, None)


def strategies(ranges: Any) -> list[str]:
    return [found.strategy for found in ranges]


@pytest.mark.parametrize("ub", [0.9, 0.2])
def test_ub_is_chosen_for_registered_outputs_and_nothing_else(ub: float) -> None:
    """However fast it is: what runs where outputs are not registered is measured to the end, and compared."""
    made = tuned(MadeUpPool(ub))
    assert strategies(made.graph) == strategies(made.eager) == ["ONESHOT", "TWOSHOT"]
    assert made.registered is not None
    assert strategies(made.registered.graph) == ["ONESHOT", "UB"]
    first = made.registered.graph[0].max_bytes
    assert first is not None
    assert LEAST / 1.2 <= first < LEAST, "from where it can be measured"
    assert [found.strategy for found in made.ranges().registered] == ["ONESHOT", "UB"]
    assert [found.strategy for found in made.ranges().ranges] == ["ONESHOT", "TWOSHOT"]
    assert CROSSING / 1.2 < (made.graph[0].max_bytes or 0) < CROSSING * 1.2
    assert all({"ONESHOT", "TWOSHOT"} & set(row.graph_us) for row in made.measured)
    assert all(("UB" in row.graph_us) == (row.bytes >= LEAST) for row in made.measured)


def test_ub_that_is_slower_is_measured_at_every_size_and_named_at_none() -> None:
    """Small messages, for which it is hopeless, say nothing of large ones."""
    pool = MadeUpPool(3.0)
    made = tuned(pool)
    assert made.registered is not None
    assert strategies(made.registered.graph) == ["ONESHOT", "TWOSHOT"]
    assert all("UB" in names for _, names in pool.asked)


def test_without_registered_memory_nothing_is_asked_or_said_of_it() -> None:
    pool = MadeUpPool(0.5)
    made = tuned(pool, places=False)
    assert made.registered is None
    assert all("UB" not in names for _, names in pool.asked)
    assert all("UB" not in row.graph_us for row in made.measured)


class MadeUpGroup:
    """A communicator that only notes down what it was opened with, and its end."""

    def __init__(self, context: MadeUpContext, pool: int | None) -> None:
        self.config, self.facts = config("AUTO", registered_pool=pool), context.facts
        self.pool, self.is_open = pool or 0, True
        self.explain = lambda _shape, _dtype: types.SimpleNamespace(launch=object())

    def close(self) -> None:
        self.is_open = False


class MadeUpContext:
    """A rank of a group of these facts."""

    def __init__(self, group_facts: GroupFacts) -> None:
        self.facts = group_facts
        self.groups: list[MadeUpGroup] = []

    def communicator(self, _strategy: str, *, registered_pool: int | None, **_settings: Any) -> MadeUpGroup:
        assert not any(group.is_open for group in self.groups), "one at a time: memory may be short"
        self.groups.append(MadeUpGroup(self, registered_pool))
        return self.groups[-1]


@pytest.mark.parametrize(
    ("group_facts", "pool"),
    [
        (facts(4, in_band=True), 64 * MIB),
        (facts(2, in_band=True), 0),
        (facts(4), 0),
        (facts(4, Transport.HOST), 0),
        (facts(2, Transport.SHM), 64 * MIB),
    ],
    ids=("four GPUs", "two GPUs take one step", "flags", "host memory", "CPU ranks"),
)
def test_registered_memory_is_mapped_only_where_ub_stores_into_it(
    monkeypatch: pytest.MonkeyPatch, group_facts: GroupFacts, pool: int
) -> None:
    context: Any = MadeUpContext(group_facts)
    monkeypatch.setitem(compare._groups, group_facts.world_size, context)
    monkeypatch.setattr(worker, "_open", {})
    settings = OurSettings(registered_pool=64 * MIB)
    found, obstacle = compare.open_kernels(context, group_facts.world_size, ("ONESHOT", "TWOSHOT", "UB"), settings)
    assert (found, obstacle) == (group_facts, "")
    assert max(group.pool for group in context.groups) == pool
    assert [group.is_open for group in context.groups] == [False] * (len(context.groups) - 1) + [True]
    assert ("UB" in worker._open) == (pool > 0)
    worker._open["TWOSHOT"].close()
    assert not context.groups[-1].is_open


def test_a_wrong_answer_ends_it() -> None:
    with pytest.raises(WrongAnswerError, match="UB gave 3 wrong elements of 65536 bytes"):
        tuned(MadeUpPool(0.5, wrong=3))
