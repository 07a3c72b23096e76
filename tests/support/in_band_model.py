"""The generations of the in-band exchange, on the memory of weak_memory.py: what its kernels have in common.

What csrc/device/in_band.cuh and shared.cuh do to slots and epochs is written down once more here, and what the
kernels do in in_band_kernels.py, thread by thread. So this tests the argument for the number of generations, not the
code. The value of a word says which call, rank, vector and word it is of, so nothing can pass for something else.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from tests.support.weak_memory import MARKER, Address, Body, Machine, Order, Steps, Word

EPOCHS = 1 << 32  # where epochs wrap around
WORDS = 2  # of a vector: enough for one to arrive in parts

Algorithm = Literal["one_shot", "two_shot", "pull"]
# A vector of another call or place, or half of one; a wait for ever; a call that ends without all of its output; at the
# end, slots that are not as they should be, and epochs.
Fault = Literal["wrong", "stuck", "missing", "uncleared", "uncounted"]
# Of a vector: region, holder, generation, source, index; or, where regions share bytes: region, holder, vector.
Place = tuple[str | int, ...]
Value = tuple[int, str, int, int]  # of a vector: call, what, source, index


class ViolationError(AssertionError):
    """A promise that did not hold; ``fault`` says which."""

    def __init__(self, fault: Fault, details: str) -> None:
        super().__init__(f"{fault}: {details}")
        self.fault = fault


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the kernels keep to. Each may be broken, to see what it is for."""

    generations: int = 0  # 0: two, or four where vectors are published
    clears_after: int = -1  # so many calls; -1: at once, or after two where vectors are published
    skipped_clear: tuple[int, int] | None = None  # a call and a rank, which leaves out its first clear
    waits_before_sending: bool = True  # for the end of the previous kernel
    kernel_ends_after_clears: bool = True  # pushed: once they have arrived
    releaser_waits: bool = True
    counts_absent_lanes: bool = True
    counts_after_all_read: bool = True
    keeps_lengths_of_absent_lanes: bool = True
    checks_every_word: bool = True
    splits_on_all_ranks: bool = True  # lanes with one task each
    counts_together: bool = True  # pushed: calls of all algorithms
    generations_alike: bool = True  # pushed: as far apart for TWOSHOT as for ONESHOT


@dataclasses.dataclass(frozen=True)
class Call:
    """One launch, the same on every rank: so many vectors, blocks, and threads of each."""

    algorithm: Algorithm
    vectors: int
    lanes: int
    threads: int
    scatter_lanes: int = 0
    drain_lanes: int = 0
    spare: int = 0  # vectors that the parts of TWOSHOT are longer than they must be, as in the last of several rounds

    @property
    def in_one_step(self) -> bool:
        return self.algorithm == "one_shot"

    def part(self, ranks: int) -> int:
        return -(-self.vectors // ranks) + self.spare

    def owned(self, ranks: int, owner: int) -> int:
        """Vectors in the part of a rank; the last parts may be shorter, or have none."""
        return max(0, min(self.part(ranks), self.vectors - owner * self.part(ranks)))


@dataclasses.dataclass
class Thread:
    """Of a kernel: which, on which rank, in which call (``index``: counted by its plane of epochs)."""

    call: Call
    number: int
    index: int
    rank: int
    block: int
    thread: int
    early: Mapping[Address, Word] | None = None  # what its first loads saw, if they came before its stores

    def share(self, first_lane: int, lanes: int, end: int) -> range:
        """Its vectors when so many lanes do a step; none when its own lane is not among them."""
        if not first_lane <= self.block < first_lane + lanes:
            return range(0)
        threads = self.call.threads
        return range((self.block - first_lane) * threads + self.thread, end, lanes * threads)


class Exchange:
    """``ranks`` whose workspaces have ``lanes`` lanes and whose epochs all are ``epoch``."""

    GENERATIONS: int
    CLEARS_AFTER: int
    RELEASERS: int  # threads of a block beyond those that the call names

    def __init__(self, ranks: int, lanes: int, order: Order, *, epoch: int = 0, rules: Rules | None = None) -> None:
        self.ranks = ranks
        self.lanes = lanes
        self.first_epoch = epoch
        self.rules = rules or Rules()
        self.generations = self.rules.generations or self.GENERATIONS
        self.clears_after = self.CLEARS_AFTER if self.rules.clears_after < 0 else self.rules.clears_after
        self.machine = Machine(order)
        self.epochs = {(plane, rank, lane): epoch for plane in self._planes() for rank, lane in self._words()}
        self.outputs: dict[tuple[int, int], set[int]] = defaultdict(set)  # vectors that a rank has of a call
        self._cleared: set[tuple[int, int]] = set()

    def _planes(self) -> tuple[str, ...]:
        return ("one_shot", "two_shot")

    def plane_of(self, call: Call) -> str:
        """What counts the call."""
        return "one_shot" if call.in_one_step else "two_shot"

    def _words(self) -> Iterator[tuple[int, int]]:
        return ((rank, lane) for rank in range(self.ranks) for lane in range(self.lanes))

    def run(self, calls: Sequence[Call]) -> None:
        """All ranks make these calls.

        Raises:
            ViolationError: a promise did not hold.
        """
        planes = [self.plane_of(call) for call in calls]
        self.indices = [planes[:number].count(plane) for number, plane in enumerate(planes)]
        self.calls = calls
        for rank in range(self.ranks):
            kernels = [
                (call.lanes, call.threads + self.RELEASERS, self._kernel(rank, number))
                for number, call in enumerate(calls)
            ]
            self.machine.launch(rank, kernels)
        self.machine.run()
        self._check_end(Counter(planes))

    def _kernel(self, rank: int, number: int) -> Body:
        call, index = self.calls[number], self.indices[number]
        if rank == 0 and not self.rules.splits_on_all_ranks:
            call = dataclasses.replace(call, scatter_lanes=0, drain_lanes=0)
        steps = getattr(self, call.algorithm)
        return lambda block, thread: steps(Thread(call, number, index, rank, block, thread))

    # -- what threads do -----------------------------------------------------------------------------------------------

    def others(self, rank: int) -> list[int]:
        """In the order of the ranks that follow this one."""
        return [(rank + step) % self.ranks for step in range(1, self.ranks)]

    def begin(self, at: Thread) -> Steps:
        if self.rules.waits_before_sending:
            yield from self._wait_for_previous_kernel(at)
        at.early = self.machine.loads_early()

    def _wait_for_previous_kernel(self, at: Thread) -> Steps:
        yield from self.machine.previous_kernel(at.rank, at.number)
        self.machine.let_next_kernel_start(at.rank, at.number, at.block)

    def epoch_of(self, at: Thread) -> int:
        if self.rules.waits_before_sending:
            return self.epochs[self.plane_of(at.call), at.rank, at.block]
        # Whoever does not wait may find the count of the call before. That is not what this rule is tried for.
        return (self.first_epoch + at.index) % EPOCHS

    def generation(self, epoch: int) -> int:
        return epoch % EPOCHS % self.generations

    def count(self, at: Thread, epoch: int) -> Steps:
        """Counts this call, for the whole block; block 0 counts for the lanes without a block."""
        if not self.rules.waits_before_sending:
            yield from self._wait_for_previous_kernel(at)
        if not self.rules.counts_after_all_read:
            self._advance(at, epoch)
        yield ()
        yield from self.machine.barrier(("block", at.rank, at.number, at.block), at.call.threads + self.RELEASERS)
        self._advance(at, epoch)

    def _advance(self, at: Thread, epoch: int) -> None:
        lanes = [at.block] if at.thread == 0 else []
        if at.block == 0 and self.rules.counts_absent_lanes:
            lanes += range(at.call.lanes + at.thread, self.lanes, at.call.threads + self.RELEASERS)
        for lane in lanes:
            self.epochs[self.plane_of(at.call), at.rank, lane] = (epoch + 1) % EPOCHS

    def store(self, at: Thread, place: Place, value: Value, waited_for: object = None) -> Steps:
        for word in range(WORDS):
            self.machine.store(at.rank, (*place, word), (*value, word), waited_for)
        yield ()

    def clear(self, at: Thread, place: Place, waited_for: object) -> Steps:
        is_first = (at.number, at.rank) not in self._cleared
        self._cleared.add((at.number, at.rank))
        if is_first and (at.number, at.rank) == self.rules.skipped_clear:
            return
        for word in range(WORDS):
            self.machine.store(at.rank, (*place, word), MARKER, waited_for)
        yield ()

    def poll(self, at: Thread, wanted: Mapping[Place, Value]) -> Steps:
        """Until all of these vectors are complete in the same poll.

        Raises:
            ViolationError: they are other ones.
        """
        checked = range(WORDS if self.rules.checks_every_word else 1)
        early = at.early
        while True:
            seen = {}
            for place in wanted:
                addresses = [(*place, word) for word in range(WORDS)]
                if early is None:
                    seen[place] = [self.machine.load(at.rank, address) for address in addresses]
                    yield ()
                else:
                    seen[place] = [early.get(address, MARKER) for address in addresses]
            if all(seen[place][word] is not MARKER for place in wanted for word in checked):
                break
            early = None
            missing = ((*place, word) for place in wanted for word in checked)
            yield tuple(address for address in missing if self.machine.words.get(address, MARKER) is MARKER)
        for place, value in wanted.items():
            if seen[place] != [(*value, word) for word in range(WORDS)]:
                details = f"rank {at.rank} in call {at.number} finds {seen[place]} in {place}"
                raise ViolationError("wrong", details)

    # -- at the end ----------------------------------------------------------------------------------------------------

    def filled(self, number: int, rank: int) -> Iterator[Place]:
        """The vectors in a rank's workspace that a call stores there."""
        raise NotImplementedError

    def _generation_of_call(self, number: int) -> int:
        return self.generation(self.first_epoch + self.indices[number])

    def _check_end(self, calls: Counter[str]) -> None:
        ended = self.machine.ended
        if ended != [len(self.calls)] * self.ranks:
            details = f"so many kernels of each rank have ended: {ended}"
            raise ViolationError("stuck", details)
        for rank in range(self.ranks):
            for number, call in enumerate(self.calls):
                if self.outputs[rank, number] != set(range(call.vectors)):
                    details = f"rank {rank} in call {number}"
                    raise ViolationError("missing", details)
        left = {
            (*place, word)
            for number, call in enumerate(self.calls)
            if calls[self.plane_of(call)] - self.indices[number] <= self.CLEARS_AFTER
            for rank in range(self.ranks)
            for place in self.filled(number, rank)
            for word in range(WORDS)
        }
        # Flags are never cleared.
        found = {address for address, word in self.machine.words.items() if word is not MARKER and address[0] != "flag"}
        if found != left:
            details = f"{sorted(found ^ left)} are not as they should be"
            raise ViolationError("uncleared", details)
        for (plane, rank, lane), epoch in self.epochs.items():
            if epoch != (self.first_epoch + calls[plane]) % EPOCHS:
                details = f"{plane}: {epoch} in lane {lane} of rank {rank}"
                raise ViolationError("uncounted", details)
