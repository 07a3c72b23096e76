"""The flagged algorithms as what they do to slots and flags, for schedulers that no machine would have.

Each rank is a generator of steps: wait for a flag, store to a slot, read one, or publish. A scheduler picks who moves
next; slots remember what lies in them and which readers still need it. What the C++ and CUDA code does is written down
once more here, so this tests the argument for four slots, not the code.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence

SLOTS = 4
Wait = tuple[str, int, int, int]  # plane, reader, writer, round
Steps = Iterator[Wait | None]


class OverwrittenError(AssertionError):
    """A slot was overwritten before it was read, or read before it was written."""


@dataclasses.dataclass
class Slot:
    round: int = 0
    readers: set[int] = dataclasses.field(default_factory=set)


class Model:
    """``ranks`` ranks on one set of published workspaces."""

    def __init__(self, domains: Sequence[int], *, careful_ring: bool = True) -> None:
        self.ranks = len(domains)
        self.domains = list(domains)
        self.careful_ring = careful_ring
        self.flags: dict[tuple[str, int, int], int] = {}
        self.slots: dict[tuple[str, int, int, int], Slot] = {}
        self.epochs = [0] * self.ranks

    # -- what ranks do -------------------------------------------------------------------------------------------------

    def _store(self, region: str, holder: int, source: int, round_: int, readers: Sequence[int]) -> None:
        slot = self.slots.setdefault((region, holder, source, round_ % SLOTS), Slot())
        if slot.readers:
            message = f"{region} of {holder} from {source}: round {round_} over {slot.round}, unread by {slot.readers}"
            raise OverwrittenError(message)
        slot.round, slot.readers = round_, set(readers)

    def _read(self, region: str, holder: int, source: int, round_: int, reader: int) -> None:
        slot = self.slots.get((region, holder, source, round_ % SLOTS), Slot())
        if slot.round != round_:
            message = f"{region} of {holder} from {source}: {reader} wants round {round_}, finds {slot.round}"
            raise OverwrittenError(message)
        slot.readers.discard(reader)

    def _publish(self, plane: str, writer: int, round_: int, readers: Sequence[int]) -> None:
        for reader in readers:
            if reader != writer:
                self.flags[plane, reader, writer] = round_

    def _others(self, rank: int) -> list[int]:
        return [peer for peer in range(self.ranks) if peer != rank]

    def two_shot(self, rank: int, chunks: int) -> Steps:
        others, epoch = self._others(rank), self.epochs[rank]
        for step in range(chunks + 2):
            if step < chunks:
                for owner in others:
                    self._store("scatter", owner, rank, epoch + step + 1, [owner])
                    yield None
                self._publish("scatter", rank, epoch + step + 1, others)
                yield None
            if 1 <= step <= chunks:
                for source in others:
                    yield ("scatter", rank, source, epoch + step)
                for source in others:
                    self._read("scatter", rank, source, epoch + step, rank)
                    yield None
                self._store("gather", rank, 0, epoch + step, others)
                yield None
                self._publish("gather", rank, epoch + step, others)
                yield None
            if step >= 2:
                for owner in others:
                    yield ("gather", rank, owner, epoch + step - 1)
                for owner in others:
                    self._read("gather", owner, 0, epoch + step - 1, rank)
                    yield None
        self.epochs[rank] = epoch + chunks

    def ring(self, rank: int, chunks: int) -> Steps:
        after, before, epoch = (rank + 1) % self.ranks, (rank - 1) % self.ranks, self.epochs[rank]
        everyone, hops = self._others(rank), chunks * 2 * (self.ranks - 1)
        for step in range(hops + 1):
            if step > 0:
                yield ("scatter", rank, before, epoch + step)
            credit = step - SLOTS if step >= SLOTS else 0 if step >= 2 and self.careful_ring else -1
            if step < hops and credit >= 0:
                yield ("gather", rank, after, epoch + credit + 1)
            if step > 0:
                self._read("scatter", rank, before, epoch + step, rank)
                yield None
            if step < hops:
                self._store("scatter", after, rank, epoch + step + 1, [after])
                yield None
                self._publish("scatter", rank, epoch + step + 1, everyone if step == hops - 1 else [after])
                yield None
            if step > 0:
                self._publish("gather", rank, epoch + step, everyone if step == hops else [before])
                yield None
        yield ("gather", rank, after, epoch + hops)
        self.epochs[rank] = epoch + hops

    def hierarchical(self, rank: int, chunks: int) -> Steps:
        mine = [peer for peer in range(self.ranks) if self.domains[peer] == self.domains[rank]]
        theirs = [peer for peer in range(self.ranks) if peer not in mine]
        other, others = theirs[mine.index(rank)], [peer for peer in mine if peer != rank]
        everyone, epoch = self._others(rank), self.epochs[rank]
        for step in range(chunks + 3):
            if step < chunks:
                for owner in others:
                    self._store("scatter", owner, rank, epoch + step + 1, [owner])
                    yield None
                self._publish("scatter", rank, epoch + step + 1, everyone if step == chunks - 1 else mine)
                yield None
            if 1 <= step <= chunks:
                for source in others:
                    yield ("scatter", rank, source, epoch + step)
                for source in others:
                    self._read("scatter", rank, source, epoch + step, rank)
                    yield None
                for holder in (other, rank):
                    self._store("scatter", holder, rank, epoch + step, [holder])
                    yield None
                self._publish("gather", rank, epoch + step, [other])
                yield None
            if 2 <= step <= chunks + 1:
                yield ("gather", rank, other, epoch + step - 1)
                for source in (other, rank):
                    self._read("scatter", rank, source, epoch + step - 1, rank)
                    yield None
                self._store("gather", rank, 0, epoch + step - 1, others)
                yield None
                self._publish("gather", rank, epoch + step - 1, everyone if step == chunks + 1 else mine)
                yield None
            if step >= 3:
                for owner in others:
                    yield ("gather", rank, owner, epoch + step - 2)
                for owner in others:
                    self._read("gather", owner, 0, epoch + step - 2, rank)
                    yield None
        self.epochs[rank] = epoch + chunks

    # -- the scheduler -------------------------------------------------------------------------------------------------

    def run(self, calls: Sequence[tuple[str, int]], generator: random.Random) -> None:
        """All ranks make these calls (algorithm, chunks); who moves next is drawn, from weights that change.

        Raises:
            OverwrittenError: the slots were not enough.
            AssertionError: all wait.
        """

        def all_calls(rank: int) -> Steps:
            for name, chunks in calls:
                call: Callable[[int, int], Steps] = getattr(self, name)
                yield from call(rank, chunks)

        programs = [all_calls(rank) for rank in range(self.ranks)]
        waits: list[Wait | None] = [None] * self.ranks
        running = set(range(self.ranks))
        weights = [1.0] * self.ranks
        for turn in range(1_000_000):
            if turn % 50 == 0:
                weights = [generator.choice((1e-4, 0.01, 1.0)) for _ in range(self.ranks)]
            ready = [rank for rank in running if self._may_go_on(waits[rank])]
            if not running:
                return
            assert ready, f"all wait: {waits}"
            rank = generator.choices(ready, [weights[rank] for rank in ready])[0]
            try:
                waits[rank] = next(programs[rank])
            except StopIteration:
                running.discard(rank)
        message = "too many turns"
        raise AssertionError(message)

    def _may_go_on(self, wait: Wait | None) -> bool:
        return wait is None or self.flags.get(wait[:3], 0) >= wait[3]
