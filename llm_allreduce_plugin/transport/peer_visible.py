"""Buffers that every rank of a group can read: what a call finds there it need not send."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.transport.symmetric import share


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
    def open(cls, agreement: Agreement, group: dist.ProcessGroup, device: torch.device, size: int) -> PeerVisibleBuffer:
        """``size`` bytes on every rank. Collective.

        Raises:
            TransportError: on every rank alike, when a rank cannot allocate or map.
        """
        storage, handle, bases = share(agreement, group, device, size)
        own = storage.data_ptr()
        return cls(storage, tuple(base - own for base in bases), handle)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether peers can read ``tensor`` in place: it lies in here, contiguous, in whole 16-byte vectors."""
        start = tensor.data_ptr() - self.storage.data_ptr()
        size = tensor.numel() * tensor.element_size()
        inside = start >= 0 and start + size <= self.storage.numel()
        return inside and start % _C.VECTOR_BYTES == 0 and size % _C.VECTOR_BYTES == 0 and tensor.is_contiguous()
