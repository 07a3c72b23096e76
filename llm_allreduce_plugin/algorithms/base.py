"""What a strategy is: can it run here, does it pay, and how is it launched."""

from __future__ import annotations

import abc
import dataclasses
import enum
import math
from typing import TYPE_CHECKING, ClassVar

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange, Launch
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts, world_size_obstacle
from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.topology.links import Transport

if TYPE_CHECKING:
    from llm_allreduce_plugin.config import AllReduceConfig

VECTOR_BYTES = _C.VECTOR_BYTES
MAX_THREADS = _C.MAX_THREADS
MAX_FLAGGED_THREADS = _C.MAX_FLAGGED_THREADS
MAX_STAGED_THREADS = _C.MAX_STAGED_THREADS
IN_BAND_THREADS = (64, 128, 256, 512)
LINE_VECTORS = 8  # 128 bytes: parts of a message start on a cache line
# 64 KiB: rounds do. From a start inside such a stretch, 85 MiB took 9 us longer (256 MiB in 3 rounds, two H100: 768 us
# instead of 745, benchmarks/h100/workspace_sizes_lines_tp2.json and workspace_sizes_tp2.json). Why is not known.
ROUND_VECTORS = 4096
TWO_SHOT_BLOCKS = 100  # of measured.LARGEST_GRID: 1 MiB on 4 H200 is fastest with 64, see shapes_tp4.json
MIN_SPLIT_LANES = 8  # fewer lanes are too few to give each its own task


class Numerics(enum.StrEnum):
    """What the bits of an answer depend on. AUTO chooses within EXACT, so its answers never depend on its choices."""

    EXACT = "fp32, ranks in order, rounded once: the same bits from every strategy and for every size"
    HOSTS = (
        "fp32, ranks in order inside each host, then hosts in order, rounded once: the same bits for every size, form "
        "and number of pieces"
    )
    LOSSY = "compressed on the wire"
    LOSSY_HOSTS = (
        "compressed between hosts: fp32, ranks in order inside each host, then hosts in order as decoded, rounded "
        "once; the same bits on every rank"
    )
    IN_SWITCH = (
        "summed in the switch, in an order that it does not tell; at least fp32 is asked for, but what the switch does "
        "differs per generation, and is not documented: the same bits on every rank, perhaps others in the next run"
    )
    ENGINE = "whatever order and precision the engine's own all-reduce has"


@dataclasses.dataclass(frozen=True)
class Message:
    """One all-reduce as the policy sees it.

    Attributes:
        count: elements per rank.
        dtype: as torch spells it, e.g. ``"bfloat16"``.
        element_bytes: 0 when no kernel handles the type.
        readable_in_place: it lies, from a multiple of 16 bytes on, in memory that every peer sees.
        registered_output: its output lies, from a multiple of 16 bytes on, in registered memory; None: it is the
            communicator's own, which takes it from there where there is such memory.
    """

    count: int
    dtype: str
    element_bytes: int
    readable_in_place: bool = False
    registered_output: bool | None = None

    @property
    def payload_bytes(self) -> int:
        return self.count * self.element_bytes

    @property
    def vectors(self) -> int:
        """16-byte vectors, the last one possibly partial."""
        return math.ceil(self.payload_bytes / VECTOR_BYTES)


@dataclasses.dataclass(frozen=True)
class Merit:
    """Whether what can run should, for a message, and why.

    Attributes:
        pays: another strategy does not do better, as far as is known.
        reason: why, or why not; empty where nothing but the settings speaks for it.
    """

    pays: bool
    reason: str = ""


class Strategy(abc.ABC):
    """One strategy: stateless, the same object on every rank.

    All that it answers is a pure function of what is wanted (the settings), what is (the facts of the group), and one
    message.
    """

    name: ClassVar[AllReduceStrategy]
    algorithm: ClassVar[str]
    numerics: ClassVar[Numerics]
    instead: ClassVar[tuple[AllReduceStrategy, ...]] = (AllReduceStrategy.NCCL,)
    """What is tried in its place, in this order. The last one is NCCL, which can always run."""

    @abc.abstractmethod
    def obstacle(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> str | None:
        """Why this strategy cannot run for this message, or None when it can."""

    def pays(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Merit:  # noqa: ARG002
        """Whether this strategy, which can run, should: otherwise it leaves the message to the next one.

        Only asked where there is no obstacle. To leave a message that does not pay is what was asked for: no fallback.
        """
        return Merit(pays=True)

    def numerics_of(self, facts: GroupFacts) -> Numerics:
        """What the bits depend on in this group."""
        return Numerics.HOSTS if self.numerics is Numerics.EXACT and facts.crosses_network else self.numerics

    def candidates(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> tuple[AllReduceStrategy, ...]:  # noqa: ARG002
        """What may run where this one is asked for, best first, before what is tried instead."""
        return (self.name,)

    def describe(self, config: AllReduceConfig, facts: GroupFacts, launch: Launch | None = None) -> tuple[str, str]:  # noqa: ARG002
        """What runs in this group, and why in this form; no reason where a strategy has only one.

        ``launch``: of a message, as :meth:`plan` has it; None: of any.
        """
        return self.algorithm, ""

    @abc.abstractmethod
    def plan(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Launch | None:
        """How a call is spread; None when it is not ours to launch. Pure: every rank gets the same."""


class KernelStrategy(Strategy):
    """A strategy that runs a kernel of this package on the group's workspaces.

    Attributes:
        spans_hosts: it can run where sums are exchanged between hosts.
    """

    spans_hosts: ClassVar[bool] = False

    @abc.abstractmethod
    def plan(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Launch:
        """How a call is spread: the kernel, its grid and its rounds. Pure."""

    def obstacle(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> str | None:  # noqa: ARG002
        if facts.transport is Transport.NONE:
            return facts.no_transport_reason or "ranks cannot reach each other's memory"
        if facts.crosses_network:
            if not self.spans_hosts:
                return f"ranks run on {facts.num_hosts} hosts, and its kernels reach one"
        elif (reason := world_size_obstacle(facts.world_size)) is not None:
            return reason
        if message.element_bytes == 0:
            return f"no kernel for dtype {message.dtype} (there are for {', '.join(ELEMENT_BYTES)})"
        return None


def spread_in_band(
    message: Message,
    facts: GroupFacts,
    algorithm: Algorithm,
    chunk_bytes: int,
    parts: int,
    split: measured.Split | None,
) -> Launch:
    """How an in-band call is spread: one vector to a thread as long as the largest grid has that many threads.

    Small blocks are best, but no more of them than two to a multiprocessor (``facts.lanes``), and in TWOSHOT, whose
    blocks stay longer, three to every four of them where that is enough. ``split``: how lanes share the tasks out
    where the largest grid has not a thread for each vector. Rounds are of equal length, but for what is left of
    ROUND_VECTORS in the last. Measured on H200 with benchmarks/shapes.py.
    """
    pieces = max(1, math.ceil(message.vectors / parts))  # vectors of the largest part
    capacity = chunk_bytes // VECTOR_BYTES
    rounds = math.ceil(pieces / capacity)
    unit = LINE_VECTORS
    if rounds > 1 and capacity >= ROUND_VECTORS:
        unit = ROUND_VECTORS
        capacity -= capacity % unit
        rounds = math.ceil(pieces / capacity)
    chunk = min(capacity, math.ceil(pieces / rounds / unit) * unit)
    rounds = math.ceil(pieces / chunk)
    if split is not None and chunk > MAX_THREADS * facts.lanes and facts.lanes >= MIN_SPLIT_LANES:
        tasks = split.on(facts.lanes)
        return Launch(
            algorithm=algorithm,
            exchange=Exchange.PUSH,
            lanes=tasks.lanes,
            threads=MAX_THREADS,
            chunk_vectors=chunk,
            rounds=rounds,
            scatter_lanes=tasks.scatter,
            drain_lanes=tasks.drain,
        )
    few = facts.lanes * TWO_SHOT_BLOCKS // measured.LARGEST_GRID if algorithm is Algorithm.TWO_SHOT else facts.lanes
    threads = next(
        (threads for most in (few, facts.lanes) for threads in IN_BAND_THREADS if threads * most >= chunk), MAX_THREADS
    )
    lanes = min(facts.lanes, math.ceil(chunk / threads))
    return Launch(algorithm, Exchange.PUSH, lanes=lanes, threads=threads, chunk_vectors=chunk, rounds=rounds)


def spread_shared(algorithm: Algorithm, vectors: int, lanes: int, *, per_thread: int = 1) -> Launch:
    """How an in-band call through host memory is spread: in small blocks as long as there are lanes.

    ``vectors``: of the message, or of the largest part; a thread has at most ``per_thread`` before blocks grow. One
    round: larger messages go by flags. Measured on H200 with benchmarks/host_shapes.py.
    """
    vectors = max(1, vectors)
    choices = (threads for threads in IN_BAND_THREADS if threads <= MAX_FLAGGED_THREADS)
    threads = next((threads for threads in choices if threads * lanes * per_thread >= vectors), MAX_FLAGGED_THREADS)
    used = min(lanes, math.ceil(vectors / threads))
    return Launch(algorithm, Exchange.SHARED, lanes=used, threads=threads, chunk_vectors=vectors, rounds=1)


def spread(
    vectors: int, algorithm: Algorithm, chunk_bytes: int, lanes: int, parts: int, most_per_thread: int | None = None
) -> Launch:
    """Spread ``vectors`` over at most ``lanes`` blocks, each handling ``parts`` pieces per round, with flags.

    Few blocks for few vectors (one vector per thread), then larger chunks, up to what a slot holds or
    ``most_per_thread`` vectors of each thread, then further rounds.
    """
    pieces = math.ceil(vectors / parts)  # vectors of the largest part
    capacity = chunk_bytes // VECTOR_BYTES
    if most_per_thread is not None:
        capacity = min(capacity, most_per_thread * MAX_FLAGGED_THREADS)
    threads = min(MAX_FLAGGED_THREADS, max(32, math.ceil(pieces / 32) * 32))
    used = max(1, min(lanes, math.ceil(pieces / min(threads, capacity))))
    chunk = max(1, min(math.ceil(pieces / used), capacity))
    rounds = math.ceil(pieces / (used * chunk))
    return Launch(algorithm, Exchange.FLAGS, lanes=used, threads=threads, chunk_vectors=chunk, rounds=rounds)
