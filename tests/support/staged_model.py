"""The handshake of csrc/device/staged_lane.cuh, and the lanes of two_shot_lane.cuh, as processes in simulated time.

Every lane of every rank is a generator that yields how long it takes, or what it waits for. Lanes run in the order that
the delays make. The model checks what the kernels promise: at any instant a rank sends to one peer and receives from
one; nothing unread is overwritten and nothing half written is read; everyone comes to an end.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator

GENERATIONS = 4

Steps = Generator[float | Callable[[], bool], None, None]
Cell = tuple[int, str, int]  # holder, region, place in the region in slots of one lane and generation


class ViolationError(AssertionError):
    """A promise that did not hold."""


class Model:
    """``ranks`` with workspaces of ``lanes`` lanes; delays, and so the order of everything, from ``seed``.

    ``slow``: a rank that stores more slowly than the others. ``grants``: off to see what they are for.
    """

    def __init__(self, ranks: int, lanes: int, seed: int, *, slow: int | None = None, grants: bool = True) -> None:
        self.ranks, self.lanes, self.slow, self.grants = ranks, lanes, slow, grants
        self.random = random.Random(seed)
        self.words: dict[tuple[object, ...], int] = defaultdict(int)
        self.arrivals = [0] * ranks
        self.cells: dict[Cell, tuple[str, object]] = {}
        self.streams: Counter[tuple[int, int]] = Counter()
        self.exclusive = False  # whether the promise of one stream holds for what runs now
        self.most_at_once = 0  # streams of different ranks
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._now = 0.0

    # -- time ----------------------------------------------------------------------------------------------------------

    def _after(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + delay, next(self._order), action))

    def run(self, programs: list[list[Callable[[], list[Steps]]]]) -> None:
        """``programs[rank]``: the calls of that rank, one after the other, each as the lanes that it consists of."""
        waiting: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        unfinished = len(programs)

        def advance(lane: Steps, done: Callable[[], None]) -> None:
            try:
                step = next(lane)
            except StopIteration:
                done()
                return
            if callable(step):
                waiting.append((step, lambda: advance(lane, done)))
            else:
                self._after(step, lambda: advance(lane, done))

        def start(calls: Iterator[Callable[[], list[Steps]]]) -> None:
            nonlocal unfinished
            call = next(calls, None)
            if call is None:
                unfinished -= 1
                return
            lanes = call()
            left = len(lanes)

            def done() -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    self._after(self.random.random() * 5, lambda: start(calls))

            for lane in lanes:
                self._after(self.random.random(), lambda lane=lane: advance(lane, done))  # type: ignore[misc]

        for calls in programs:
            start(iter(calls))
        while self._events:
            self._now, _, action = heapq.heappop(self._events)
            action()
            ready = [entry for entry in waiting if entry[0]()]
            waiting[:] = [entry for entry in waiting if entry not in ready]
            for _, resume in ready:
                self._after(self.random.random() * 0.1, resume)
        if unfinished:
            message = f"{unfinished} ranks wait for ever"
            raise ViolationError(message)
        if unread := [cell for cell, (state, _) in self.cells.items() if state != "read"]:
            message = f"never read: {unread}"
            raise ViolationError(message)

    # -- what lanes do -------------------------------------------------------------------------------------------------

    def store(self, rank: int, target: int, cells: list[Cell], value: object) -> Steps:
        for cell in cells:
            if self.cells.get(cell, ("read", None))[0] != "read":
                message = f"rank {rank} overwrites {cell}, {self.cells[cell]}, with {value}"
                raise ViolationError(message)
            self.cells[cell] = ("half written", value)
        if rank != target:
            self.streams[rank, target] += 1
            self._check_streams()
        yield self.random.random() * (40 if rank == self.slow else 4)
        if rank != target:
            self.streams[rank, target] -= 1
        for cell in cells:
            self.cells[cell] = ("unread", value)

    def _check_streams(self) -> None:
        active = [pair for pair, count in self.streams.items() if count]
        self.most_at_once = max(self.most_at_once, len(active))
        if not self.exclusive:
            return
        for end in (0, 1):
            busy = Counter(pair[end] for pair in active)
            if busy and max(busy.values()) > 1:
                message = f"at {self._now}: more than one stream {('out of', 'into')[end]} a rank: {active}"
                raise ViolationError(message)

    def load(self, cells: list[Cell], value: object, *, last: bool = True) -> Steps:
        for _ in range(2):  # the same before and after the time that it takes
            for cell in cells:
                if self.cells.get(cell) != ("unread", value):
                    message = f"{cell} is {self.cells.get(cell)}, not {value}"
                    raise ViolationError(message)
            yield self.random.random()
        if last:
            for cell in cells:
                self.cells[cell] = ("read", value)

    def release(self, word: tuple[object, ...], value: int) -> None:
        def arrive() -> None:
            self.words[word] = max(self.words[word], value)

        self._after(self.random.random() * 3, arrive)

    def reached(self, word: tuple[object, ...], value: int) -> Callable[[], bool]:
        return lambda: self.words[word] >= value

    # -- staged_lane.cuh -----------------------------------------------------------------------------------------------

    def staged(self, rank: int, lanes: int, rounds: int, call: int) -> list[Steps]:
        epoch = self.words["staged", rank]
        return [self._staged_lane(rank, lane, lanes, rounds, epoch, call) for lane in range(lanes)]

    def _staged_cells(self, holder: int, region: str, source: int, lane: int, lanes: int) -> list[Cell]:
        """As much of the slot as a lane can have: all generations and lanes of the region are one slot."""
        whole = GENERATIONS * self.lanes
        each = whole // lanes
        first = source * whole + lane * each
        return [(holder, region, place) for place in range(first, first + each)]

    def _exchange_with_all(self, rank: int, value: int) -> Steps:
        others = [other for other in range(self.ranks) if other != rank]
        for other in others:
            self.release(("grant", other, rank), value)
        for other in others:
            yield self.reached(("grant", rank, other), value)

    def _arrive(self, rank: int, lanes: int) -> bool:
        self.arrivals[rank] = (self.arrivals[rank] + 1) % lanes
        return self.arrivals[rank] == 0

    def _staged_lane(self, rank: int, lane: int, lanes: int, rounds: int, epoch: int, call: int) -> Steps:
        ranks = self.ranks
        number = rounds * 2 * (ranks - 1)

        def peer(step: int) -> int:
            return (rank + step) % ranks

        def step_of(stage: int) -> int:
            return stage % (ranks - 1) + 1

        def end(stage: int, meanwhile: Steps) -> Steps:
            last = self._arrive(rank, lanes)
            yield from meanwhile
            if last:
                self.release(("data", peer(step_of(stage)), rank), epoch + stage + 1)
                yield self.reached(("data", rank, peer(-step_of(stage))), epoch + stage + 1)
                if stage + 1 < number:
                    self.release(("grant", peer(-step_of(stage + 1)), rank), epoch + stage + 2)
                    if self.grants:
                        yield self.reached(("grant", rank, peer(step_of(stage + 1))), epoch + stage + 2)
                self.words["open", rank] = epoch + stage + 2
            yield self.reached(("open", rank), epoch + stage + 2)

        def drain(owner: int, turn: int) -> Steps:
            cells = self._staged_cells(rank, "gather", owner, lane, lanes)
            return self.load(cells, (call, turn, "sum", owner, lane))

        if lane == 0:
            yield from self._exchange_with_all(rank, epoch + 1)
            self.words["open", rank] = epoch + 1
        yield self.reached(("open", rank), epoch + 1)
        stage = 0
        for turn in range(rounds):
            for step in range(1, ranks):
                owner = peer(step)
                cells = self._staged_cells(owner, "scatter", rank, lane, lanes)
                yield from self.store(rank, owner, cells, (call, turn, rank, owner, lane))
                yield from end(stage, _nothing())
                stage += 1
            for source in range(ranks):
                if source != rank:
                    cells = self._staged_cells(rank, "scatter", source, lane, lanes)
                    yield from self.load(cells, (call, turn, source, rank, lane))
            mine = self._staged_cells(rank, "gather", rank, lane, lanes)
            result = (call, turn, "sum", rank, lane)
            yield from self.store(rank, rank, mine, result)
            for step in range(1, ranks):
                reader = peer(step)
                yield from self.load(mine, result, last=step == ranks - 1)
                cells = self._staged_cells(reader, "gather", rank, lane, lanes)
                yield from self.store(rank, reader, cells, result)
                yield from end(stage, drain(peer(1 - step), turn) if step > 1 else _nothing())
                stage += 1
            yield from drain(peer(1 - ranks), turn)
        if self._arrive(rank, lanes):
            yield from self._exchange_with_all(rank, epoch + number + 1)
            self.words["staged", rank] = epoch + number + 1

    # -- two_shot_lane.cuh ---------------------------------------------------------------------------------------------

    def flagged(self, rank: int, lanes: int, chunks: int, call: int) -> list[Steps]:
        return [self._flagged_lane(rank, lane, chunks, call) for lane in range(lanes)]

    def _flagged_lane(self, rank: int, lane: int, chunks: int, call: int) -> Steps:
        ranks = self.ranks
        peers = [other for other in range(ranks) if other != rank]
        epoch = self.words["two-shot", rank, lane]

        def cells(holder: int, region: str, source: int, chunk: int) -> list[Cell]:
            generation = (epoch + chunk + 1) % GENERATIONS
            return [(holder, region, (generation * ranks + source) * self.lanes + lane)]

        def wait(plane: str, chunk: int) -> Steps:
            for other in peers:
                yield self.reached((plane, lane, rank, other), epoch + chunk + 1)

        def publish(plane: str, chunk: int) -> None:
            for other in peers:
                self.release((plane, lane, other, rank), epoch + chunk + 1)

        for step in range(chunks + 2):
            if step < chunks:
                for owner in peers:
                    yield from self.store(rank, owner, cells(owner, "scatter", rank, step), (call, step, rank, owner))
                publish("scatter", step)
            if 1 <= step <= chunks:
                yield from wait("scatter", step - 1)
                for source in peers:
                    yield from self.load(cells(rank, "scatter", source, step - 1), (call, step - 1, source, rank))
                for reader in peers:
                    where = cells(reader, "gather", rank, step - 1)
                    yield from self.store(rank, reader, where, (call, step - 1, "sum", rank))
                publish("gather", step - 1)
            if step >= 2:
                yield from wait("gather", step - 2)
                for owner in peers:
                    yield from self.load(cells(rank, "gather", owner, step - 2), (call, step - 2, "sum", owner))
        self.words["two-shot", rank, lane] = epoch + chunks


def _nothing() -> Steps:
    return
    yield
