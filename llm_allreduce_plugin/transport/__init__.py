"""How ranks see each other's bytes: ``symmetric`` and ``host`` for GPUs, ``shm`` for CPU ranks.

A transport gives every rank the address at which it sees each peer's workspace, and proves that it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llm_allreduce_plugin.topology.links import Transport


class SharedMemory(Protocol):
    """Workspaces of all ranks, as this rank sees them."""

    transport: Transport
    bases: list[int]  # address of each rank's workspace in this process, in rank order
    local: int  # address of what only this rank touches; 0: in its workspace

    def close(self) -> None:
        """Let go of the memory. No kernel may be running on it."""
