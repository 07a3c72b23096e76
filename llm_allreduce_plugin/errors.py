"""What can go wrong, by name."""

from __future__ import annotations

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


class TransportError(AllReduceError, RuntimeError):
    """Ranks cannot reach each other's memory; the text says why. The communicator then falls back to NCCL."""


class PeerTimeoutError(AllReduceError, TimeoutError):
    """A peer did not arrive within ``timeout_s``.

    The text reads like ``rank 1 waited 60 s for rank 3 in ONESHOT/gather``. The group cannot be used again: ranks
    no longer agree on how many calls they have made.

    Attributes:
        rank: the rank that gave up.
        peer: the rank it was waiting for.
        strategy: the algorithm, e.g. ``"ONESHOT"``.
        phase: what it was waiting for: ``"gather"`` or ``"scatter"``.
        waited_s: seconds waited.
    """

    def __init__(self, rank: int, peer: int, strategy: str, phase: str, waited_s: float) -> None:
        self.rank = rank
        self.peer = peer
        self.strategy = strategy
        self.phase = phase
        self.waited_s = waited_s
        super().__init__(f"rank {rank} waited {waited_s:.3g} s for rank {peer} in {strategy}/{phase}")
