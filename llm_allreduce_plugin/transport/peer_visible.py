"""Buffers that every rank of a group can read: what a call finds there it need not send."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.transport.mapped import bytes_at
from llm_allreduce_plugin.transport.peer import share_peer_bytes


@dataclasses.dataclass(frozen=True)
class PeerVisibleBuffer:
    """Memory of this rank that all peers have mapped, and they theirs.

    Attributes:
        storage: its bytes; a tensor of them keeps them mapped, whoever closes what.
        peer_distances: bytes from this rank's buffer to where this rank sees each rank's, in rank order; 0 for its own.
        handle: keeps the mapping alive.
    """

    storage: torch.Tensor
    peer_distances: tuple[int, ...]
    handle: object

    @classmethod
    def open(
        cls, agreement: Agreement, group: dist.ProcessGroup, device: torch.device, size: int, *, by_files: bool
    ) -> PeerVisibleBuffer:
        """``size`` bytes on every rank, mapped ``by_files`` or by torch, as the workspace. Collective.

        Raises:
            TransportError: on every rank alike, when a rank cannot allocate or map.
        """
        whole, handle, bases = share_peer_bytes(agreement, group, device, size, by_files=by_files)
        own = whole.data_ptr()
        storage = bytes_at(own, size, device, keeps=(whole, handle))
        return cls(storage, tuple(base - own for base in bases), handle)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether peers can read ``tensor`` in place: it lies in here, contiguous, in whole 16-byte vectors."""
        start = tensor.data_ptr() - self.storage.data_ptr()
        size = tensor.numel() * tensor.element_size()
        inside = start >= 0 and start + size <= self.storage.numel()
        return inside and start % _C.VECTOR_BYTES == 0 and size % _C.VECTOR_BYTES == 0 and tensor.is_contiguous()
