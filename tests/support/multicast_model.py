"""The algorithms that go by multicast as what they do to slots, for switches and schedulers that no machine would have.

Each rank is a generator of steps; a store is under way to each rank by itself, its own included, and arrives whenever
the scheduler likes, only not before an earlier one of the same rank to the same place. What the CUDA code does is
written down once more here, so this tests the argument in csrc/device/multicast.cuh, not the code.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence

Place = tuple[str | int, ...]
Value = tuple[int | str, ...] | None  # None: the marker
Call = tuple[str, int]  # algorithm, vectors


class WrongValueError(AssertionError):
    """A rank has taken something else than it was to be sent."""


class StuckError(AssertionError):
    """Ranks wait for what nobody will store."""


class UnclearedError(AssertionError):
    """Something lies in slots when all calls have ended."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What each argument rests on; False, or another number: that rule is broken."""

    polls_own: bool = True
    absolute_places: bool = True
    clears_own_alone: bool = True
    generations: int = 2


class Model:
    """``ranks`` ranks, which make the same calls."""

    def __init__(self, ranks: int, rules: Rules | None = None) -> None:
        self.ranks = ranks
        self.rules = rules or Rules()
        self.memory: list[dict[Place, Value]] = [{} for _ in range(ranks)]
        self.under_way: dict[tuple[int, int, Place], deque[Value]] = {}  # (sender, receiver, place)
        self.epochs = [0] * ranks

    def run(self, calls: Sequence[Call], generator: random.Random) -> None:
        """All calls on all ranks.

        Raises:
            WrongValueError, StuckError, UnclearedError: they are not what they should be.
        """
        ranks: dict[int, Iterator[Callable[[], bool] | None]] = {
            rank: self._rank(rank, calls, generator) for rank in range(self.ranks)
        }
        waits: dict[int, Callable[[], bool]] = {}
        deliver_often = generator.random()
        while ranks or self.under_way:
            ready = [rank for rank in ranks if rank not in waits or waits[rank]()]
            if self.under_way and (not ready or generator.random() < deliver_often):
                self._deliver(generator.choice(list(self.under_way)))
                continue
            if not ready:
                message = f"ranks {sorted(ranks)} wait for what nobody stores"
                raise StuckError(message)
            rank = generator.choice(ready)
            waits.pop(rank, None)
            try:
                wait = next(ranks[rank])
            except StopIteration:
                del ranks[rank]
                continue
            if wait is not None:
                waits[rank] = wait
        left = [(rank, place) for rank, slots in enumerate(self.memory) for place in slots]
        if left:
            message = f"not cleared, (rank, place): {left[:4]}"
            raise UnclearedError(message)

    def _deliver(self, key: tuple[int, int, Place]) -> None:
        _, receiver, place = key
        value = self.under_way[key].popleft()
        if not self.under_way[key]:
            del self.under_way[key]
        self._set(receiver, place, value)

    def _set(self, rank: int, place: Place, value: Value) -> None:
        if value is None:
            self.memory[rank].pop(place, None)
        else:
            self.memory[rank][place] = value

    # -- what ranks do -------------------------------------------------------------------------------------------------

    def _store(self, sender: int, receivers: Sequence[int], place: Place, value: Value) -> None:
        for receiver in receivers:
            self.under_way.setdefault((sender, receiver, place), deque()).append(value)

    def _clear(self, rank: int, place: Place) -> None:
        if self.rules.clears_own_alone or place[0] == "scatter":
            self._set(rank, place, None)
        else:
            self._store(rank, range(self.ranks), place, None)

    def _take(self, rank: int, place: Place, expected: Value) -> Iterator[Callable[[], bool] | None]:
        yield lambda: place in self.memory[rank]
        if (found := self.memory[rank][place]) != expected:
            message = f"rank {rank} finds {found} at {place}, wants {expected}"
            raise WrongValueError(message)
        self._clear(rank, place)
        yield None

    def _rank(self, rank: int, calls: Sequence[Call], generator: random.Random) -> Iterator[Callable[[], bool] | None]:
        for number, (algorithm, vectors) in enumerate(calls):
            epoch = self.epochs[rank]  # of all algorithms, whose slots in workspaces are the same bytes
            self.epochs[rank] += 1
            steps = self._one_shot if algorithm == "one_shot" else self._two_shot
            yield from steps(rank, number, epoch % self.rules.generations, vectors, generator)

    def _one_shot(
        self, rank: int, number: int, generation: int, vectors: int, generator: random.Random
    ) -> Iterator[Callable[[], bool] | None]:
        for i in range(vectors):
            self._store(rank, range(self.ranks), ("one_shot", generation, rank, i), (number, rank, i))
            yield None
        wanted = [(source, i) for source in range(self.ranks) for i in range(vectors)]
        generator.shuffle(wanted)
        for source, i in wanted:
            if source == rank and not self.rules.polls_own:
                continue
            holder = source if self.rules.absolute_places else (source - rank - 1) % self.ranks
            yield from self._take(rank, ("one_shot", generation, holder, i), (number, source, i))

    def _two_shot(
        self, rank: int, number: int, generation: int, vectors: int, generator: random.Random
    ) -> Iterator[Callable[[], bool] | None]:
        part = -(-vectors // self.ranks)
        others = [peer for peer in range(self.ranks) if peer != rank]
        for index in range(vectors):
            if (owner := index // part) != rank:
                self._store(rank, [owner], ("scatter", generation, rank, index % part), (number, rank, index))
                yield None
        for index in range(rank * part, min(vectors, (rank + 1) * part)):
            for peer in others:
                yield from self._take(rank, ("scatter", generation, peer, index % part), (number, peer, index))
            self._store(rank, range(self.ranks), ("results", index), (number, "sum", index))
            yield None
        wanted = list(range(vectors))
        generator.shuffle(wanted)
        for index in wanted:
            if index // part == rank and not self.rules.polls_own:
                continue
            at = index if self.rules.absolute_places else (index - rank * part) % (part * self.ranks)
            yield from self._take(rank, ("results", at), (number, "sum", index))
