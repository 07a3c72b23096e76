"""The record of a choice: what runs, how it is launched, why, and why nothing else."""

from __future__ import annotations

import dataclasses

from llm_allreduce_plugin.config import AllReduceStrategy


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel call is spread. Equal on every rank.

    Attributes:
        lanes: blocks (CPU ranks: 1).
        threads: threads per block.
        chunk_vectors: 16-byte vectors that a lane moves to one peer per round.
        rounds: rounds in one call; more than one when the message exceeds the workspace's slots.
        in_band: readiness travels inside the data; otherwise flags tell when a chunk may be read.
    """

    lanes: int
    threads: int
    chunk_vectors: int
    rounds: int
    in_band: bool = False


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
    """

    requested: AllReduceStrategy
    strategy: AllReduceStrategy
    algorithm: str
    launch: Launch | None
    reason: str
    passed_over: tuple[PassedOver, ...]

    @property
    def is_fallback(self) -> bool:
        """True when a strategy was asked for by name and another one runs."""
        return self.requested not in (AllReduceStrategy.AUTO, self.strategy)

    def __str__(self) -> str:
        lines = [f"{self.strategy}: {self.algorithm}", f"  because {self.reason}"]
        if self.launch is not None:
            launch = self.launch
            lines.append(
                f"  launch: {launch.lanes} blocks x {launch.threads} threads, {launch.rounds} round(s) of "
                f"{launch.chunk_vectors * 16} bytes per block and peer, {'in band' if launch.in_band else 'flagged'}"
            )
        lines += [f"  not {other.strategy}: {other.reason}" for other in self.passed_over]
        return "\n".join(lines)
