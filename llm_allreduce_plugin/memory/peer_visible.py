"""Buffers that every rank of a group can read: what a call finds there it need not send."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from llm_allreduce_plugin.agreement import first_fault
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.memory.symmetric import without_multicast

ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class PeerVisibleBuffer:
    """Memory of this rank that all peers have mapped, and they theirs.

    Attributes:
        storage: its bytes.
        peer_distances: bytes from this rank's buffer to where this rank sees each rank's, in rank order; 0 for its own.
        handle: keeps the mapping alive.
    """

    storage: torch.Tensor
    peer_distances: tuple[int, ...]
    handle: object

    @classmethod
    def open(
        cls, group: dist.ProcessGroup, control_group: dist.ProcessGroup, device: torch.device, size: int
    ) -> PeerVisibleBuffer:
        """``size`` bytes on every rank. Collective.

        Raises:
            TransportError: on every rank alike, when a rank cannot allocate or map.
        """
        error: str | None = None
        made: PeerVisibleBuffer | None = None
        try:
            with without_multicast(), torch.cuda.device(device):
                storage = symm_mem.empty(size, dtype=torch.uint8, device=device)
                handle = symm_mem.rendezvous(storage, group)
                own = storage.data_ptr()
                made = cls(storage, tuple(int(base) - own for base in handle.buffer_ptrs), handle)
        except Exception as failure:  # noqa: BLE001  (torch raises many kinds; each means the same here)
            error = f"rank {dist.get_rank(group)} cannot share {size} bytes with its peers: {failure}"
        if (fault := first_fault(error, control_group)) is not None:
            raise TransportError(fault.splitlines()[0])
        assert made is not None
        return made

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether peers can read ``tensor`` in place: it lies in here, contiguous, in whole 16-byte vectors."""
        start = tensor.data_ptr() - self.storage.data_ptr()
        size = tensor.numel() * tensor.element_size()
        inside = start >= 0 and start + size <= self.storage.numel()
        return inside and start % ALIGNMENT == 0 and size % ALIGNMENT == 0 and tensor.is_contiguous()
