"""Kernels on the streams of several ranks, in a memory that orders no more than GPUs promise.

Threads are generators, a step for each access to memory, and whose step comes next is drawn. A store is under way until
it arrives, and which one arrives next is drawn as well. Two stores arrive in order only if one rank stores twice to the
same word, or if something waited for the first in between: the end of a kernel or a fence, see :meth:`Machine.store`.

Kernels of a rank follow each other as with programmatic dependent launch: the next one begins once all blocks of this
one let it, and waits by itself for the end of this one.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Final

MARKER: Final = "marker"  # what lies in a word before anything is stored there

Address = tuple[Hashable, ...]
Word = Hashable
Keys = tuple[Hashable, ...]
# A step ends with keys, of which any wakes the thread again, or with none when it goes on at once.
Steps = Generator[Keys, None, None]
Body = Callable[[int, int], Steps]  # block, thread


@dataclasses.dataclass(frozen=True)
class Order:
    """From which the order of everything is drawn.

    All that can happen next has a number from 0 to 1, and the lowest happens. In ``changes`` of the cases it gets
    another number instead. A pace is added to the numbers of a rank: with -1 they come before all others, with 1 last.
    """

    seed: int
    changes: float
    threads: tuple[int, ...]  # the paces of each rank: its threads,
    data: tuple[int, ...]  # the vectors that it sends,
    clears: tuple[int, ...]  # and the markers that it stores
    early: float  # the share of threads that load for the first time before they store anything
    resident: int  # blocks of a kernel that run at once


class _Thread:
    def __init__(self, steps: Steps, pace: int) -> None:
        self.steps = steps
        self.pace = pace
        self.asleep = False


class Machine:
    """The memory, and what runs on it."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.random = random.Random(order.seed)
        self.words: dict[Address, Word] = {}
        self.ended = [0] * len(order.threads)  # kernels of each rank, which run in the order of their numbers
        self.most_ahead = 0  # kernels that one rank had ended and another had not
        self._counts: Counter[Hashable] = Counter()  # of stores under way and of threads at a barrier, by name
        self._letting: dict[tuple[int, int], set[int]] = defaultdict(set)  # blocks that let the next kernel start
        self._number = 0.0  # of what happens now
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._ties = itertools.count()
        self._asleep: dict[Hashable, list[_Thread]] = defaultdict(list)
        self._under_way: dict[tuple[int, Address], deque[tuple[Word, Hashable]]] = defaultdict(deque)

    # -- what happens next ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until nothing can happen: all threads have ended, or those that have not would wait for ever."""
        while self._events:
            number, _, pace, action = heapq.heappop(self._events)
            if self.random.random() < self.order.changes:
                self._schedule(pace, action)
            else:
                self._number = number
                action()

    def _schedule(self, pace: int, action: Callable[[], None], number: float | None = None) -> None:
        if number is None:
            number = pace + self.random.random()
        heapq.heappush(self._events, (number, next(self._ties), pace, action))

    def start(self, rank: int, steps: Steps) -> None:
        thread = _Thread(steps, self.order.threads[rank])
        self._schedule(thread.pace, lambda: self._step(thread))

    def _step(self, thread: _Thread) -> None:
        keys = next(thread.steps, None)
        if keys is None:
            return
        if not keys:  # on it goes, for as long as its number is the lowest
            self._schedule(thread.pace, lambda: self._step(thread), self._number)
            return
        thread.asleep = True
        for key in keys:
            self._asleep[key].append(thread)

    def wake(self, key: Hashable) -> None:
        for thread in self._asleep.pop(key, ()):
            if thread.asleep:
                thread.asleep = False
                self._schedule(thread.pace, lambda thread=thread: self._step(thread))  # type: ignore[misc]

    # -- memory --------------------------------------------------------------------------------------------------------

    def load(self, rank: int, address: Address) -> Word:
        """What has arrived there, and in any case what this rank itself has stored there."""
        while self._under_way.get((rank, address)):
            self._arrive(rank, address)
        return self.words.get(address, MARKER)

    def store(self, rank: int, address: Address, word: Word, waited_for: Hashable = None) -> None:
        """``waited_for``: a name for those that :meth:`arrived` waits for together; None: nobody waits for it."""
        self._counts[waited_for] += 1
        queue = self._under_way[rank, address]
        queue.append((word, waited_for))
        if len(queue) == 1:
            self._send(rank, address)

    def _send(self, rank: int, address: Address) -> None:
        word, _ = self._under_way[rank, address][0]
        pace = (self.order.clears if word is MARKER else self.order.data)[rank]
        self._schedule(pace, lambda: self._arrive(rank, address))

    def _arrive(self, rank: int, address: Address) -> None:
        queue = self._under_way[rank, address]
        if not queue:
            return  # it arrived when its rank loaded it
        word, waited_for = queue.popleft()
        self.words[address] = word
        self.wake(address)
        self._counts[waited_for] -= 1
        if self._counts[waited_for] == 0:
            self.wake(waited_for)
        if queue:
            self._send(rank, address)

    def arrived(self, waited_for: Hashable) -> Steps:
        """Waits for all stores of that name."""
        while self._counts[waited_for] > 0:
            yield (waited_for,)

    def loads_early(self) -> dict[Address, Word] | None:
        """What a thread sees whose first loads come before all of its stores; None for the others."""
        return dict(self.words) if self.random.random() < self.order.early else None

    # -- kernels -------------------------------------------------------------------------------------------------------

    def launch(self, rank: int, kernels: Sequence[tuple[int, int, Body]], number: int = 0) -> None:
        """All kernels of a rank from that number on, each as its blocks, their threads and what a thread does."""
        if number == len(kernels):
            return
        blocks, threads, body = kernels[number]
        left = blocks
        waiting = iter(range(blocks))

        def run_thread(block: int, thread: int) -> Steps:
            nonlocal left
            yield from body(block, thread)
            self._counts["threads", rank, number, block] += 1
            if self._counts["threads", rank, number, block] == threads:
                left -= 1
                start_block()
                self.wake(("blocks", rank, number))

        def start_block() -> None:
            for block in itertools.islice(waiting, 1):
                for thread in range(threads):
                    self.start(rank, run_thread(block, thread))

        def end() -> Steps:
            while left:
                yield (("blocks", rank, number),)
            yield from self.previous_kernel(rank, number)
            yield from self.arrived(("kernel", rank, number))
            self.ended[rank] = number + 1
            self.most_ahead = max(self.most_ahead, number + 1 - min(self.ended))
            self.wake(("ended", rank, number))

        def next_kernel() -> Steps:
            while len(self._letting[rank, number]) < blocks:
                yield (("letting", rank, number),)
            self.launch(rank, kernels, number + 1)

        for _ in range(self.order.resident):
            start_block()
        self.start(rank, end())
        self.start(rank, next_kernel())

    def previous_kernel(self, rank: int, number: int) -> Steps:
        """Waits for the end of the kernel before this one, and of all that it stored under ("kernel", rank, number)."""
        while self.ended[rank] < number:
            yield (("ended", rank, number - 1),)

    def let_next_kernel_start(self, rank: int, number: int, block: int) -> None:
        self._letting[rank, number].add(block)
        self.wake(("letting", rank, number))

    def barrier(self, name: Hashable, threads: int, *, waits: bool = True) -> Steps:
        """Of a block: for so many threads, of which this one may only arrive."""
        self._counts[name] += 1
        if self._counts[name] == threads:
            self.wake(name)
        while waits and self._counts[name] < threads:
            yield (name,)
