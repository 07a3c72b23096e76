"""What a strategy is: can it run here, how it is spread, how it is launched."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.selection.decision import Launch
from llm_allreduce_plugin.selection.facts import ELEMENT_BYTES, GroupFacts, Transport, world_size_obstacle

if TYPE_CHECKING:
    from llm_allreduce_plugin.config import AllReduceStrategy

VECTOR_BYTES = _C.VECTOR_BYTES
MAX_THREADS = _C.MAX_THREADS
IN_BAND_THREADS = (128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Message:
    """One all-reduce as the policy sees it.

    Attributes:
        count: elements per rank.
        dtype: as torch spells it, e.g. ``"bfloat16"``.
        element_bytes: 0 when no kernel handles the type.
    """

    count: int
    dtype: str
    element_bytes: int

    @property
    def payload_bytes(self) -> int:
        return self.count * self.element_bytes

    @property
    def vectors(self) -> int:
        """16-byte vectors, the last one possibly partial."""
        return math.ceil(self.payload_bytes / VECTOR_BYTES)


class Strategy(abc.ABC):
    """One strategy: stateless, the same object on every rank."""

    name: ClassVar[AllReduceStrategy]
    algorithm: ClassVar[str]

    @abc.abstractmethod
    def obstacle(self, facts: GroupFacts, message: Message) -> str | None:
        """Why this strategy cannot run for this message, or None when it can."""

    @abc.abstractmethod
    def plan(self, facts: GroupFacts, message: Message) -> Launch | None:
        """How a call is spread; None when it is not ours to launch. Pure: every rank gets the same."""


class KernelStrategy(Strategy):
    """A strategy that runs a kernel of this package on the group's workspaces."""

    @abc.abstractmethod
    def launch(
        self, workspace: _C.Workspace, input_: int, output: int, count: int, dtype: int, launch: Launch, stream: int
    ) -> int:
        """Start the kernel on ``count`` elements at two addresses; returns the status of the C ABI."""

    def obstacle(self, facts: GroupFacts, message: Message) -> str | None:
        if facts.transport is Transport.NONE:
            return facts.no_transport_reason or "ranks cannot reach each other's memory"
        if (reason := world_size_obstacle(facts.world_size)) is not None:
            return reason
        if message.element_bytes == 0:
            return f"no kernel for dtype {message.dtype} (there are for {', '.join(ELEMENT_BYTES)})"
        return None


class MissingStrategy(Strategy):
    """A strategy whose kernel does not exist yet: it always falls back, and says so."""

    def obstacle(self, facts: GroupFacts, message: Message) -> str | None:  # noqa: ARG002
        return f"the {self.name} kernel does not exist yet"

    def plan(self, facts: GroupFacts, message: Message) -> Launch | None:
        raise AssertionError(facts, message)  # never chosen


def spread_in_band(message: Message, chunk_bytes: int, lanes: int, parts: int) -> Launch | None:
    """How an in-band call is spread; None when the message does not fit the in-band slots at once.

    Small blocks are best: one vector per thread, and as few warps to a block as the number of lanes allows (measured on
    H200 at 2 and 4 ranks, 4 KiB to 1 MiB: benchmarks/h200/block_shapes.json).
    """
    if chunk_bytes == 0:
        return None
    for threads in IN_BAND_THREADS:
        launch = spread(message.vectors, chunk_bytes, lanes, parts, threads)
        if launch.rounds <= 1 and launch.chunk_vectors <= threads:
            return dataclasses.replace(launch, in_band=True)
    # Several vectors per thread of the largest blocks, if that is enough.
    return dataclasses.replace(launch, in_band=True) if launch.rounds <= 1 else None


def spread(vectors: int, chunk_bytes: int, lanes: int, parts: int, max_threads: int = MAX_THREADS) -> Launch:
    """Spread ``vectors`` over at most ``lanes`` blocks, each handling ``parts`` pieces per round.

    Few blocks for few vectors (one vector per thread), then larger chunks, then further rounds.
    """
    pieces = math.ceil(vectors / parts)  # vectors of the largest part
    capacity = chunk_bytes // VECTOR_BYTES
    threads = min(max_threads, max(32, math.ceil(pieces / 32) * 32))
    used = max(1, min(lanes, math.ceil(pieces / min(threads, capacity))))
    chunk = max(1, min(math.ceil(pieces / used), capacity))
    rounds = math.ceil(pieces / (used * chunk))
    return Launch(lanes=used, threads=threads, chunk_vectors=chunk, rounds=rounds)
