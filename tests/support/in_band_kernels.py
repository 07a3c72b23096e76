"""The in-band kernels of csrc/kernels/, as far as slots and epochs go, thread by thread.

Pushed, of one_shot.cu: the in-band kernel (the short one is the same with at most a vector to a thread) and the split
one; of two_shot.cu: the same, and the one that reads inputs in place. Published: those of both files. LOWPRECISION's
(low_precision.cu) store, poll and clear as TWOSHOT's split and published kernels do, a warp to a packet.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import Any

from tests.support.in_band_model import EPOCHS, Call, Exchange, Place, Thread, Value, ViolationError
from tests.support.weak_memory import Keys, Steps

LEAD = 2  # kLead of one_shot.cu
MOST_OF_A_PART = 6  # vectors; a slot of ONESHOT holds twice as many
MOST_ROUNDS_AHEAD = 256  # of host/layout.h


class Pushed(Exchange):
    """A rank stores into the workspaces of its peers; the reader clears behind itself."""

    GENERATIONS = 2
    CLEARS_AFTER = 0
    RELEASERS = 0

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._inputs: dict[int, int] = {}  # of each rank: the call that it is for, since that has begun
        self._rounds = dict.fromkeys(self._words(), self.first_epoch)  # of inputs read in place, which lanes count

    def _planes(self) -> tuple[str, ...]:
        return ("pushed",) if self.rules.counts_together else super()._planes()

    def plane_of(self, call: Call) -> str:
        return "pushed" if self.rules.counts_together else super().plane_of(call)

    def _slot(self, region: str, holder: int, generation: int, source: int, i: int) -> Place:
        """Where a vector lies: slots of all regions share the bytes of a generation."""
        peers, step = self.ranks - 1, (source - holder) % self.ranks - 1
        of_a_generation = 2 * peers * MOST_OF_A_PART
        if region == "one_shot":
            at = step * 2 * MOST_OF_A_PART
        else:
            at = (step + (peers if region == "gather" else 0)) * MOST_OF_A_PART
            if not self.rules.generations_alike:
                of_a_generation = peers * MOST_OF_A_PART
        return ("slots", holder, generation * of_a_generation + at + i)

    def filled(self, number: int, rank: int) -> Iterator[Place]:
        call, generation = self.calls[number], self._generation_of_call(number)
        for peer in self.others(rank):
            if call.in_one_step:
                yield from (self._slot("one_shot", rank, generation, peer, i) for i in range(call.vectors))
                continue
            if call.algorithm == "two_shot":
                yield from (
                    self._slot("scatter", rank, generation, peer, i) for i in range(call.owned(self.ranks, rank))
                )
            yield from (self._slot("gather", rank, generation, peer, i) for i in range(call.owned(self.ranks, peer)))

    def _take(self, at: Thread, wanted: dict[Place, Value]) -> Steps:
        yield from self.poll(at, wanted)
        if self.clears_after == 0:
            for place in wanted:
                yield from self._clear(at, place)

    def _clear(self, at: Thread, place: Place) -> Steps:
        return self.clear(at, place, ("kernel", at.rank, at.number) if self.rules.kernel_ends_after_clears else None)

    def _end(self, at: Thread) -> Steps:
        """Clears what should have been cleared earlier, where that rule is broken."""
        index = at.index - self.clears_after
        if self.clears_after == 0 or index < 0:
            return
        plane = self.plane_of(at.call)
        number = next(
            n for n, call in enumerate(self.calls) if (self.plane_of(call), self.indices[n]) == (plane, index)
        )
        places = list(self.filled(number, at.rank))
        for i in at.share(0, at.call.lanes, len(places)):
            yield from self._clear(at, places[i])

    def one_shot(self, at: Thread) -> Steps:
        call, others = at.call, self.others(at.rank)
        yield from self.begin(at)
        epoch = self.epoch_of(at)
        generation = self.generation(epoch)
        pushers = call.scatter_lanes
        pushes = iter(at.share(0, pushers or call.lanes, call.vectors))

        def push(number: int) -> Steps:
            for i in itertools.islice(pushes, number):
                for peer in others:
                    place = self._slot("one_shot", peer, generation, at.rank, i)
                    yield from self.store(at, place, (at.number, "", at.rank, i))

        if pushers == 0:
            yield from push(LEAD)
        yield from self.count(at, epoch)
        if at.block < pushers:
            yield from push(call.vectors)
        for i in at.share(pushers, call.lanes - pushers, call.vectors):
            yield from push(1)
            places = {self._slot("one_shot", at.rank, generation, peer, i): (at.number, "", peer, i) for peer in others}
            yield from self._take(at, places)
            self.outputs[at.rank, at.number].add(i)
        yield from self._end(at)

    def two_shot(self, at: Thread) -> Steps:
        call, part = at.call, at.call.part(self.ranks)
        own = call.owned(self.ranks, at.rank)
        yield from self.begin(at)
        epoch = self.epoch_of(at)
        generation = self.generation(epoch)
        scatterers, drainers = call.scatter_lanes, call.drain_lanes
        if scatterers == 0:
            stride = call.lanes * call.threads
            yield from self._scatter(at, generation, at.share(0, call.lanes, part))
            yield from self.count(at, epoch)
            for i in at.share(0, call.lanes, part + stride):  # results are taken one vector behind
                if i < own:
                    yield from self._reduce(at, generation, i)
                if i >= stride:
                    yield from self._drain(at, generation, i - stride)
        else:
            reducers = call.lanes - scatterers - drainers
            yield from self.count(at, epoch)
            yield from self._scatter(at, generation, at.share(0, scatterers, part))
            for i in at.share(scatterers, reducers, own):
                yield from self._reduce(at, generation, i)
            first, lanes = (scatterers + reducers, drainers) if drainers else (scatterers, reducers)
            for i in at.share(first, lanes, part):
                yield from self._drain(at, generation, i)
        yield from self._end(at)

    def _scatter(self, at: Thread, generation: int, vectors: range) -> Steps:
        for i in vectors:
            for owner in self.others(at.rank):
                if i < at.call.owned(self.ranks, owner):
                    value = (at.number, "partial", at.rank, i)
                    yield from self.store(at, self._slot("scatter", owner, generation, at.rank, i), value)

    def _reduce(self, at: Thread, generation: int, i: int) -> Steps:
        yield from self._take(
            at,
            {
                self._slot("scatter", at.rank, generation, peer, i): (at.number, "partial", peer, i)
                for peer in self.others(at.rank)
            },
        )
        yield from self._give_back(at, generation, i)

    def _give_back(self, at: Thread, generation: int, i: int) -> Steps:
        for peer in self.others(at.rank):
            place = self._slot("gather", peer, generation, at.rank, i)
            yield from self.store(at, place, (at.number, "result", at.rank, i))
        self.outputs[at.rank, at.number].add(at.rank * at.call.part(self.ranks) + i)

    def _drain(self, at: Thread, generation: int, i: int) -> Steps:
        owners = [owner for owner in self.others(at.rank) if i < at.call.owned(self.ranks, owner)]
        places = {
            self._slot("gather", at.rank, generation, owner, i): (at.number, "result", owner, i) for owner in owners
        }
        yield from self._take(at, places)
        self.outputs[at.rank, at.number].update(owner * at.call.part(self.ranks) + i for owner in owners)

    def pull(self, at: Thread) -> Steps:
        """TWOSHOT that reads inputs in place. A rank's input is there when its call begins and may go when it ends."""
        call, part = at.call, at.call.part(self.ranks)
        yield from self.begin(at)
        self._inputs[at.rank] = at.number
        epoch = self.epoch_of(at)
        generation = self.generation(epoch)
        round_ = (self._rounds[at.rank, at.block] + 1) % EPOCHS
        yield from self.machine.barrier(("publish", at.rank, at.number, at.block), call.threads)
        for peer in self.others(at.rank)[at.thread :: call.threads]:
            self.machine.store(at.rank, ("flag", peer, at.block, at.rank), round_)
            yield ()
        yield from self.count(at, epoch)
        for peer in self.others(at.rank):
            flag = ("flag", at.rank, at.block, peer)
            while not self._reached(self.machine.load(at.rank, flag), round_):
                yield (flag,)
            yield ()
        self._rounds[at.rank, at.block] = round_
        stride = call.lanes * call.threads
        for i in at.share(0, call.lanes, part + stride):
            if i < call.owned(self.ranks, at.rank):
                if any(self._inputs[peer] != at.number for peer in self.others(at.rank)):
                    details = f"call {at.number} reads inputs of the calls {self._inputs}"
                    raise ViolationError("wrong", details)
                yield from self._give_back(at, generation, i)
            if i >= stride:
                yield from self._drain(at, generation, i - stride)
        yield from self._end(at)

    def _reached(self, seen: object, round_: int) -> bool:
        return isinstance(seen, int) and (seen - round_) % EPOCHS < MOST_ROUNDS_AHEAD


class Published(Exchange):
    """A rank stores into its own workspace, and clears there two calls later; peers read there."""

    GENERATIONS = 4
    CLEARS_AFTER = 2
    RELEASERS = 1

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._lengths: dict[tuple[str, int, int, int], int] = {}  # plane, rank, generation, lane

    def filled(self, number: int, rank: int) -> Iterator[Place]:
        call, generation = self.calls[number], self._generation_of_call(number)
        if call.algorithm == "one_shot":
            yield from (("one_shot", rank, generation, rank, i) for i in range(call.vectors))
            return
        for i in range(call.owned(self.ranks, rank)):
            yield ("gather", rank, generation, rank, i)
            yield from (("scatter", rank, generation, peer, i) for peer in self.others(rank))

    def _is_releaser(self, at: Thread) -> bool:
        return at.thread >= at.call.threads

    def _share(self, at: Thread, end: int) -> range:
        return range(0) if self._is_releaser(at) else at.share(0, at.call.lanes, end)

    def _publish(self, at: Thread, place: Place, value: Value) -> Steps:
        return self.store(at, place, value, ("block", at.rank, at.number, at.block, "stores"))

    def _count_call(self, at: Thread, epoch: int, vectors: int) -> Generator[Keys, None, int]:
        """Returns how many vectors of the old generation there are to clear."""
        plane, old = self.plane_of(at.call), self.generation(epoch - self.clears_after)
        old_vectors = self._lengths.get((plane, at.rank, old, at.block), 0)
        lanes = [at.block] if at.thread == 0 else []
        if at.block == 0 and self.rules.keeps_lengths_of_absent_lanes:
            lanes += range(at.call.lanes + at.thread, self.lanes, at.call.threads + self.RELEASERS)
        for lane in lanes:
            self._lengths[plane, at.rank, self.generation(epoch), lane] = vectors
        yield from self.count(at, epoch)
        return old_vectors

    def _clear_old(self, at: Thread, epoch: int, i: int, *, scatters: bool) -> Steps:
        generation = self.generation(epoch - self.clears_after)
        region = "gather" if scatters else "one_shot"
        waited_for = ("block", at.rank, at.number, at.block, "stores")
        yield from self.clear(at, (region, at.rank, generation, at.rank, i), waited_for)
        for peer in self.others(at.rank) if scatters else []:
            yield from self.clear(at, ("scatter", at.rank, generation, peer, i), waited_for)

    def _clear_old_generation(self, at: Thread, epoch: int, vectors: int, *, scatters: bool, first: int = 0) -> Steps:
        for i in self._share(at, vectors):
            if i >= first:
                yield from self._clear_old(at, epoch, i, scatters=scatters)
        yield from self._releaser_barrier(at, waits=False)

    def _settle_clears(self, at: Thread) -> Steps:
        yield from self._releaser_barrier(at, waits=True)
        if self.rules.releaser_waits:
            yield from self.machine.arrived(("block", at.rank, at.number, at.block, "stores"))

    def _releaser_barrier(self, at: Thread, *, waits: bool) -> Steps:
        name = ("block", at.rank, at.number, at.block, "releaser")
        return self.machine.barrier(name, at.call.threads + self.RELEASERS, waits=waits)

    def one_shot(self, at: Thread) -> Steps:
        vectors, rank = at.call.vectors, at.rank
        yield from self.begin(at)
        epoch = self.epoch_of(at)
        generation = self.generation(epoch)
        for i in self._share(at, vectors):
            yield from self._publish(at, ("one_shot", rank, generation, rank, i), (at.number, "", rank, i))
        old_vectors = yield from self._count_call(at, epoch, vectors)
        if self._is_releaser(at):
            yield from self._settle_clears(at)
            return
        for i in self._share(at, vectors):
            if i < old_vectors:
                yield from self._clear_old(at, epoch, i, scatters=False)
            places = {("one_shot", peer, generation, peer, i): (at.number, "", peer, i) for peer in self.others(rank)}
            yield from self.poll(at, places)
            self.outputs[rank, at.number].add(i)
        yield from self._clear_old_generation(at, epoch, old_vectors, scatters=False, first=vectors)

    def two_shot(self, at: Thread) -> Steps:
        call, rank, others = at.call, at.rank, self.others(at.rank)
        part = call.part(self.ranks)
        yield from self.begin(at)
        epoch = self.epoch_of(at)
        generation = self.generation(epoch)
        for i in self._share(at, part):
            for owner in others:
                if i < call.owned(self.ranks, owner):
                    place = ("scatter", owner, generation, rank, i)
                    yield from self._publish(at, place, (at.number, "partial", rank, i))
        old_vectors = yield from self._count_call(at, epoch, part)
        if self._is_releaser(at):
            yield from self._settle_clears(at)
            return
        for i in self._share(at, call.owned(self.ranks, rank)):
            partials = {("scatter", rank, generation, peer, i): (at.number, "partial", peer, i) for peer in others}
            yield from self.poll(at, partials)
            yield from self._publish(at, ("gather", rank, generation, rank, i), (at.number, "result", rank, i))
            self.outputs[rank, at.number].add(rank * part + i)
        yield from self._clear_old_generation(at, epoch, old_vectors, scatters=True)
        for i in self._share(at, part):
            owners = [owner for owner in others if i < call.owned(self.ranks, owner)]
            results = {("gather", owner, generation, owner, i): (at.number, "result", owner, i) for owner in owners}
            yield from self.poll(at, results)
            self.outputs[rank, at.number].update(owner * part + i for owner in owners)
