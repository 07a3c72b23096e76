"""The record of a choice: what runs, how it is launched, why, and why nothing else."""

from __future__ import annotations

import dataclasses
import enum

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.config import AllReduceStrategy, WireFormat
from llm_allreduce_plugin.quantization import QuantKind
from llm_allreduce_plugin.wire import PACKETS


class Algorithm(enum.IntEnum):
    """Who sums what, with the numbers of ``lar_algorithm``."""

    ONE_SHOT = 0
    TWO_SHOT = 1
    RING = 2
    HIERARCHICAL = 3
    REDUCE = 4  # halves of what runs over several hosts, see Launch.hosts
    REDUCE_SCATTER = 5
    HOST_SUM = 6
    HOST_SUM_GATHER = 7

    @property
    def in_words(self) -> str:
        """``two-shot``."""
        return self.name.lower().replace("_", "-")


class Exchange(enum.IntEnum):
    """How readiness travels, with the numbers of ``lar_exchange``."""

    PUSH = 0  # in band, into a slot of each peer
    SHARED = 1  # in band, stored once in memory that all ranks share
    FLAGS = 2
    STAGED = 3  # flags, and at any time a GPU sends to one peer and receives from one
    PULL = 4  # peers read the input in place; results are pushed
    PLACE = 5  # results are stored into peers' outputs; inputs are pushed
    MULTICAST = 6  # in band, through memory of which one store reaches every rank
    IN_SWITCH = 7  # the same, and the switch sums: not exact


class Epilogue(enum.IntEnum):
    """What becomes of a reduced vector, with the numbers of ``lar_epilogue``."""

    STORE = 0
    RMS_NORM = 1  # + residual, RMSNorm, and a quantization where there is one


_EXCHANGES = {
    Exchange.PUSH: "in band",
    Exchange.SHARED: "in band",
    Exchange.FLAGS: "flagged",
    Exchange.STAGED: "staged",
    Exchange.PULL: "in band, peers read the input in place",
    Exchange.PLACE: "results are stored into peers' outputs",
    Exchange.MULTICAST: "in band, by multicast",
    Exchange.IN_SWITCH: "in band, by multicast, summed in the switch",
}
_COUNTED_APART = {
    Exchange.PULL: "pull",
    Exchange.PLACE: "place",
    Exchange.MULTICAST: "multicast",
    Exchange.IN_SWITCH: "in switch",
}
IN_BAND = frozenset(
    {Exchange.PUSH, Exchange.SHARED, Exchange.PULL, Exchange.PLACE, Exchange.MULTICAST, Exchange.IN_SWITCH}
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel call is spread. Equal on every rank.

    Attributes:
        algorithm: who sums what.
        exchange: how readiness travels.
        lanes: blocks (CPU ranks: 1).
        threads: threads per block.
        chunk_vectors: 16-byte vectors that a lane (in band: all lanes together) moves to one peer per round.
        rounds: rounds in one call; more than one when the message exceeds the workspace's slots.
        scatter_lanes: lanes that only send this rank's input; 0 when every lane does everything.
        drain_lanes: lanes that only take in results; 0 when those that sum do it.
        wire_format: what values are sent as; None: as they are.
        domains: the domain of each rank, for HIERARCHICAL.
        epilogue: what becomes of a reduced vector.
        cluster: RMS_NORM: blocks that share a row.
        idle_lanes: RMS_NORM: of ``lanes``, those that never have a row (:class:`~.measured.Leaves`).
        hosts: hosts whose sums are exchanged; 1: there is one. With more, ONE_SHOT sums whole messages inside each
            host, TWO_SHOT a part on each rank; chunks and rounds are of a piece, and ``wire_format`` is of those sums.
        pieces: of several hosts: pieces of the message, of which one is exchanged while others are summed.
    """

    algorithm: Algorithm
    exchange: Exchange
    lanes: int
    threads: int
    chunk_vectors: int
    rounds: int
    scatter_lanes: int = 0
    drain_lanes: int = 0
    wire_format: WireFormat | None = None
    domains: tuple[int, ...] = ()
    epilogue: Epilogue = Epilogue.STORE
    cluster: int = 1
    idle_lanes: int = 0
    hosts: int = 1
    pieces: int = 1

    @property
    def in_band(self) -> bool:
        """Readiness travels inside the data; otherwise flags tell when a chunk may be read."""
        return self.exchange in IN_BAND

    @property
    def staged(self) -> bool:
        """Whether it moves in stages."""
        return self.exchange is Exchange.STAGED

    @property
    def exchange_in_words(self) -> str:
        """How a rank knows that what it reads is there, and where it reads a peer's input."""
        return _EXCHANGES[self.exchange]

    @property
    def wire_code(self) -> int:
        """``wire_format`` in the C ABI."""
        return _C.WIRE_RAW if self.wire_format is None else PACKETS[self.wire_format].code

    def __str__(self) -> str:
        words = f"{self.lanes} blocks x {self.threads} threads"
        if self.scatter_lanes:
            words += f" ({self.scatter_lanes} only send"
            words += f", {self.drain_lanes} only receive)" if self.drain_lanes else ")"
        if self.cluster > 1:
            words += f" ({self.cluster} to a row{f', {self.idle_lanes} without one' if self.idle_lanes else ''})"
        elif self.idle_lanes:
            words += f" ({self.idle_lanes} without a row)"
        spread = "per peer" if self.in_band else "per block and peer"
        return (
            f"{words}, {self.rounds} round(s) of {self.chunk_vectors * 16} bytes {spread}, "
            f"{self.exchange_in_words}{f', as {self.wire_format}' if self.wire_format and self.hosts == 1 else ''}"
            f"{f', ranks in domains {self.domains}' if self.domains else ''}"
            f"{f', in {self.pieces} piece(s) over {self.hosts} hosts' if self.hosts > 1 else ''}"
            f"{f', as {self.wire_format} between them' if self.wire_format and self.hosts > 1 else ''}"
        )


@dataclasses.dataclass(frozen=True)
class PassedOver:
    """A strategy that does not run for this message, and the reason."""

    strategy: AllReduceStrategy
    reason: str


@dataclasses.dataclass(frozen=True)
class Decision:
    """What happens to one message.

    Attributes:
        requested: the configured strategy.
        strategy: the strategy that runs.
        algorithm: what that is, in words.
        launch: how the kernel is launched; None for NCCL.
        reason: why this one.
        passed_over: every other strategy with the reason against it, those asked for first.
        by_design: the strategy asked for can run and leaves this message to another one, as documented: LOWPRECISION
            leaves small messages to MINLATENCY.
        numerics: what the bits of the answer depend on.
    """

    requested: AllReduceStrategy
    strategy: AllReduceStrategy
    algorithm: str
    launch: Launch | None
    reason: str
    passed_over: tuple[PassedOver, ...]
    by_design: bool = False
    numerics: str = ""

    @property
    def counted_as(self) -> str:
        """What reports and metrics count it as: the strategy, and an exchange that is not the usual one.

        That peers store into its outputs is told where the strategy's name does not say so.
        """
        how = None if self.launch is None else _COUNTED_APART.get(self.launch.exchange)
        return f"{self.strategy} ({how})" if how and self.strategy is not AllReduceStrategy.UB else str(self.strategy)

    @property
    def runs_another(self) -> bool:
        """True when a strategy was asked for by name and another one runs, for whatever reason."""
        return self.requested not in (AllReduceStrategy.AUTO, self.strategy)

    @property
    def is_fallback(self) -> bool:
        """True when a strategy was asked for by name and another one runs because that one cannot."""
        return self.runs_another and not self.by_design

    def __str__(self) -> str:
        lines = [f"{self.strategy}: {self.algorithm}", f"  because {self.reason}"]
        if self.launch is not None:
            lines.append(f"  launch: {self.launch}")
        if self.launch is not None and (self.launch.hosts > 1 or self.launch.exchange is Exchange.IN_SWITCH):
            lines.append(f"  bits: {self.numerics}")
        lines += [f"  not {other.strategy}: {other.reason}" for other in self.passed_over]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class FusedDecision:
    """What happens to an all-reduce with residual, RMSNorm and quantization behind it.

    Attributes:
        launch: how the kernel is launched that does all of it; None: the all-reduce runs, then a kernel for the norm,
            which give the same bits.
        reason: why in one kernel, or why in two.
        all_reduce: what happens to the all-reduce alone, and why.
        by_design: nobody asked for one kernel, two are faster, or there is nothing to do: two are no fallback.
        quant: what the one kernel quantizes to; None: nothing is quantized, or in a kernel of its own.
    """

    launch: Launch | None
    reason: str
    all_reduce: Decision
    by_design: bool = False
    quant: QuantKind | None = dataclasses.field(default=None, compare=False)  # for words: it changes nothing that runs

    @property
    def counted_as(self) -> str:
        """What reports and metrics count it as: ``ONESHOT (fused norm)``, or ``ONESHOT, then norm``."""
        if self.launch is None:
            return f"{self.all_reduce.counted_as}, then norm"
        kernel = self.launch.algorithm.name.replace("_", "")
        names = {AllReduceStrategy.ONESHOT, AllReduceStrategy.TWOSHOT, AllReduceStrategy.UB}
        names_kernel = self.all_reduce.strategy in names
        return f"{kernel if names_kernel else self.all_reduce.strategy} (fused norm)"

    def __str__(self) -> str:
        if self.launch is None:
            return f"all-reduce, then norm: two kernels\n  because {self.reason}\n{self.all_reduce}"
        behind = "residual and norm" if self.quant is None else f"residual, norm and quantization ({self.quant})"
        lines = [
            f"{self.counted_as}: {self.launch.algorithm.in_words}; {behind} in the same kernel",
            f"  because {self.reason}",
            f"  launch: {self.launch}",
            f"  without the norm {self.all_reduce.strategy}, because {self.all_reduce.reason}",
        ]
        return "\n".join(lines)
