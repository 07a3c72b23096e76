"""What a tuning profile says about one kind of group: what was measured, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.ranges import Range, TunedRanges
from llm_allreduce_plugin.base.validation import PlainText
from llm_allreduce_plugin.quantization import UNIT
from llm_allreduce_plugin.topology.links import TopologyClass, Transport

# The kernels of the exact class. A profile that names anything else is not valid, so no profile can change bits.
Kernel = Literal["ONESHOT", "TWOSHOT"]
# Those, and the one that stores results into registered outputs, for where there are such.
Placing = Literal["ONESHOT", "TWOSHOT", "UB"]
# One kernel for a sum and the norm behind it, or two (``ONE_KERNEL``, ``TWO_KERNELS``).
Runs = Literal["fused", "then-norm"]

Microseconds = Annotated[float, Field(ge=0)]


class Frozen(BaseModel):
    """A part of a profile."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProfileRange(Frozen):
    """Messages up to ``max_bytes`` per rank (None: all larger ones) run on ``strategy``."""

    max_bytes: int | None = Field(ge=0)
    strategy: Kernel


class RegisteredRange(Frozen):
    """The same of messages whose results may go straight into registered outputs."""

    max_bytes: int | None = Field(ge=0)
    strategy: Placing


class FusedRange(Frozen):
    """Messages up to ``max_bytes`` per rank (None: all larger ones), with a norm behind the sum, run as ``runs``."""

    max_bytes: int | None = Field(ge=0)
    runs: Runs


class Measured(Frozen):
    """Microseconds per call of every strategy at one size; those that had become far slower are left out."""

    bytes: int = Field(ge=1)
    graph_us: dict[Placing, Microseconds] = Field(default_factory=dict)
    eager_us: dict[Placing, Microseconds] = Field(default_factory=dict)


class FusedMeasured(Frozen):
    """Microseconds per call at one size, in one kernel and in two."""

    bytes: int = Field(ge=1)
    strategy: Kernel = Field(description="whose sum it was: what the ranges of the entry say for this size")
    graph_us: dict[Runs, Microseconds] = Field(default_factory=dict)
    eager_us: dict[Runs, Microseconds] = Field(default_factory=dict)


def _check_ranges(name: str, ranges: Sequence[ProfileRange | RegisteredRange | FusedRange]) -> None:
    """Raise ValueError unless limits rise and the last range, alone, has none."""
    limits = [found.max_bytes for found in ranges]
    bounded = [limit for limit in limits[:-1] if limit is not None]
    if not limits or limits[-1] is not None or len(bounded) < len(limits) - 1:
        message = f"{name}: the last range, and no other, has max_bytes null"
        raise ValueError(message)
    if bounded != sorted(set(bounded)):
        message = f"{name}: max_bytes must rise, not {bounded}"
        raise ValueError(message)


class Ranged(Frozen):
    """A part that has ranges, ``graph`` and ``eager``: each class has the fields itself, where files have them."""

    @model_validator(mode="after")
    def _ranges_in_order(self) -> Self:
        for name in ("graph", "eager"):
            _check_ranges(name, getattr(self, name))
        return self


class RegisteredEntry(Ranged):
    """Where results go straight into registered outputs, of messages for which they may.

    All others, and those sizes for which this does not say UB, go by the ranges of the entry itself.

    Attributes:
        graph: ranges by the times in CUDA graphs.
        eager: ranges by the times of eager calls.
    """

    graph: tuple[RegisteredRange, ...]
    eager: tuple[RegisteredRange, ...]


class FusedEntry(Ranged):
    """Whether residual and norm belong in the kernel of the sum.

    Attributes:
        hidden: elements of a row that was measured.
        graph: ranges by the times in CUDA graphs.
        eager: ranges by the times of eager calls.
        measured: the times behind them.
    """

    hidden: int = Field(ge=UNIT)
    graph: tuple[FusedRange, ...]
    eager: tuple[FusedRange, ...]
    measured: tuple[FusedMeasured, ...]


class Entry(Ranged):
    """What was measured for one kind of group.

    Attributes:
        world_size: ranks.
        hosts: of which sums are exchanged, over a network; 1: there is no network between the ranks.
        transport: how they reach each other.
        topology_class: what their bytes travel over.
        in_band: whether readiness travels inside the data, as a setting says.
        element_bytes: size of an element; ``dtype`` is the one that was measured.
        date: when, in UTC.
        method: how.
        environment: versions and driver.
        graph: ranges by the times in CUDA graphs.
        eager: ranges by the times of eager calls.
        measured: the times behind them.
        fused: the same of sums with a norm behind them; None: nothing fused was measured.
        registered: where there are registered outputs; None: UB was not measured.
    """

    world_size: int = Field(ge=2)
    hosts: int = Field(default=1, ge=1)
    transport: Transport
    topology_class: TopologyClass
    in_band: bool
    element_bytes: Literal[2, 4]
    dtype: PlainText
    date: PlainText
    method: PlainText
    environment: dict[PlainText, PlainText]
    graph: tuple[ProfileRange, ...]
    eager: tuple[ProfileRange, ...]
    measured: tuple[Measured, ...]
    fused: FusedEntry | None = None
    registered: RegisteredEntry | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What there is one entry for."""
        return (self.world_size, self.hosts, self.transport, self.in_band, self.element_bytes)

    def serves(self, facts: GroupFacts) -> bool:
        """True when a group of this kind was measured."""
        hosts, in_band = facts.summed_hosts, facts.in_band.two_shot > 0
        group = (facts.world_size, hosts, facts.transport, in_band)
        return (self.world_size, self.hosts, self.transport, self.in_band) == group

    @property
    def decides_in_graphs(self) -> bool:
        """Whether ``graph`` decides, for every call, or ``eager`` does. The only place that says which.

        One of them for all calls of a group: a rank that captures a graph while another makes the call at once must
        launch the same kernel. On GPUs it is ``graph``: times in graphs are the GPU's, those of eager calls mostly the
        host's, which do not depend on the strategy. CPU ranks have no graphs.
        """
        return self.transport is not Transport.SHM

    @property
    def in_words(self) -> str:
        """Which times decide: ``measured <date> ...``."""
        return "in CUDA graphs" if self.decides_in_graphs else "in eager calls"

    def ranges(self) -> TunedRanges:
        """Those that decide, as the policy takes them."""
        ranges = self.graph if self.decides_in_graphs else self.eager
        fused: Sequence[FusedRange] = ()
        registered: Sequence[RegisteredRange] = ()
        if self.fused is not None:
            fused = self.fused.graph if self.decides_in_graphs else self.fused.eager
        if self.registered is not None:
            registered = self.registered.graph if self.decides_in_graphs else self.registered.eager
        return TunedRanges(
            self.element_bytes,
            tuple(Range(found.max_bytes, found.strategy) for found in ranges),
            tuple(Range(found.max_bytes, found.runs) for found in fused),
            tuple(Range(found.max_bytes, found.strategy) for found in registered),
        )

    def __str__(self) -> str:
        hosts = f" on {self.hosts} hosts" if self.hosts > 1 else ""
        return f"{self.world_size} ranks{hosts}, {self.transport.in_words}, {8 * self.element_bytes}-bit elements"
