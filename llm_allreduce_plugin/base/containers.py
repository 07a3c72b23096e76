"""What the control group of a container says of its memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # version 1 writes a number that no machine has
# Limit, use and statistics, of version 2 and of version 1.
_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


@dataclasses.dataclass(frozen=True)
class ContainerMemory:
    """In bytes.

    Attributes:
        limit: that ends whoever comes over it; None: there is none.
        used: of it, shared memory and what is cached of files included.
        statistics: the file that says what it is used for.
    """

    limit: int | None
    used: int
    statistics: Path


def memory_of_container(folder: Path = CGROUP) -> ContainerMemory | None:
    """By its control group, of either version; None where there is none, or it says nothing."""
    for most, used, statistics in _FILES:
        try:
            limit, now = (folder / most).read_text().strip(), int((folder / used).read_text())
            bounded = limit != "max" and int(limit) < _NO_LIMIT
        except (OSError, ValueError):
            continue
        return ContainerMemory(int(limit) if bounded else None, now, folder / statistics)
    return None
