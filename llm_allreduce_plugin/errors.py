"""What can go wrong, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


class AllReduceError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(AllReduceError, ValueError):
    """A setting is wrong. The text names the source, the field, the value and what is allowed."""


class UnreadableFileError(AllReduceError, ValueError):
    """A file cannot be read as what it should be. The text names the file and the reason.

    Attributes:
        path: of the file.
        reason: what is wrong with it, to follow its name: ``"is not a regular file"``.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path} {reason}")


class TopologyError(AllReduceError, ValueError):
    """A topology file cannot be read or makes no sense. The text names the file and the field."""


class ProfileError(AllReduceError, ValueError):
    """A tuning profile cannot be used. The text names the file and the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"tuning profile {path}: {reason}")


class CacheError(AllReduceError, OSError):
    """There is no cache folder. The text says why, and what to set. What wants a cache goes on without."""


class RankMismatchError(AllReduceError, RuntimeError):
    """Ranks started with different settings or capabilities. The text names the field and each rank's value."""


class GroupBrokenError(AllReduceError, RuntimeError):
    """A group cannot be used again although no wait has expired. The text says why."""


class TransportError(AllReduceError, RuntimeError):
    """Ranks cannot reach each other's memory; the text says why. The communicator then falls back to NCCL."""


def ranks_text(ranks: Sequence[int]) -> str:
    """``"rank 2"`` or ``"ranks 2, 3"``."""
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def ranks_with(values: Iterable[str]) -> dict[str, list[int]]:
    """The ranks behind each value, of values in rank order; the value of the lowest rank comes first."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    return holders


class StartError(AllReduceError, RuntimeError):
    """Ranks cannot agree: one has failed, or what carries their words is gone. The text names it."""


class StartTimeoutError(StartError, TimeoutError):
    """A rank did not come to a step that all must take together, within ``start_timeout_s``.

    The text reads like ``rank 0 waited 300 s at the start for ranks 2, 3 to agree on the transport; see their logs
    (start_timeout_s)``.

    Attributes:
        rank: the rank that gave up.
        missing: the ranks that did not come.
        step: what for.
        waited_s: seconds waited.
    """

    def __init__(
        self,
        rank: int,
        missing: Sequence[int],
        step: str,
        waited_s: float,
        when: str = "at the start",
        setting: str = "start_timeout_s",
        *,
        stuck_store: bool = False,
        text: str = "",
    ) -> None:
        self.rank = rank
        self.missing = list(missing)
        self.step = step
        self.waited_s = waited_s
        peers = ranks_text(self.missing) if self.missing else "its peers"
        if not text and stuck_store:
            text = (
                f"rank {rank} waited {waited_s:.3g} s {when} {step}: the store of the process group does not "
                f"answer, and nothing was heard of {peers}. Is the process that serves it, often rank 0's, stopped? "
                f"({setting})"
            )
        logs = "its log" if len(self.missing) == 1 else "their logs"
        super().__init__(
            text or f"rank {rank} waited {waited_s:.3g} s {when} for {peers} {step}; see {logs} ({setting})"
        )


class PeerTimeoutError(AllReduceError, TimeoutError):
    """A peer did not arrive within ``timeout_s``.

    The text reads like ``rank 1 waited 60 s for rank 3 in ONESHOT/gather``, and goes on with what is known of that
    peer: ``, whose process has ended``. A rank that came after its peers had given up is told that. The group cannot be
    used again: ranks no longer agree on how many calls they have made.

    Attributes:
        rank: the rank that gave up.
        peer: the rank it was waiting for.
        strategy: the algorithm, e.g. ``"ONESHOT"``.
        phase: what it was waiting for: ``"gather"`` or ``"scatter"``.
        waited_s: seconds waited.
    """

    def __init__(
        self, rank: int, peer: int, strategy: str, phase: str, waited_s: float, *, known: str = "", text: str = ""
    ) -> None:
        self.rank = rank
        self.peer = peer
        self.strategy = strategy
        self.phase = phase
        self.waited_s = waited_s
        super().__init__(text or f"rank {rank} waited {waited_s:.3g} s for rank {peer} in {strategy}/{phase}{known}")
