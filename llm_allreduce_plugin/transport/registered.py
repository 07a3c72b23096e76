"""Registered memory: one pool on every rank, which all peers have mapped, for outputs that peers store into.

It is opened at the start and never grows: peers could not map more of it while one of them waits in a call, or
captures a graph. Tensors lie at the same offset on every rank, so that one distance for each peer serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.shm import PAGE_BYTES, ShmMemory
from llm_allreduce_plugin.transport.symmetric import share

ALIGNMENT = 512  # as torch allocates, in bytes; whole cache lines


class RegisteredPool:
    """Memory of this rank that all peers have mapped, and they theirs.

    Args and attributes:
        storage: its bytes.
        peer_distances: bytes from this rank's pool to where this rank sees each rank's, in rank order; 0 for its own.
        handle: keeps the mapping alive.

    Attributes:
        used: bytes that tensors have been given, from the start on.
    """

    def __init__(self, storage: torch.Tensor, peer_distances: tuple[int, ...], handle: object) -> None:
        self.storage = storage
        self.peer_distances = peer_distances
        self.used = 0
        self._first, self._end = storage.data_ptr(), storage.data_ptr() + storage.numel()
        self._handle: object | None = handle

    @classmethod
    def open(
        cls, agreement: Agreement, group: dist.ProcessGroup, device: torch.device, transport: Transport, size: int
    ) -> RegisteredPool:
        """``size`` bytes on every rank, through GPUs' own memory, or shared memory for CPU ranks. Collective.

        Raises:
            TransportError: on every rank alike, when a rank cannot allocate or map.
        """
        if transport is Transport.SHM:
            each = math.ceil(size / PAGE_BYTES) * PAGE_BYTES
            shared = ShmMemory.open(agreement, each)
            own, bases = shared.bases[agreement.rank], shared.bases
            # A tensor of it keeps the mapping, whoever closes the pool.
            first = own - shared.address
            storage = torch.frombuffer(shared.buffer, dtype=torch.uint8, count=size, offset=first)
            return cls(storage, tuple(base - own for base in bases), shared)
        storage, handle, bases = share(agreement, group, device, size)
        return cls(storage, tuple(base - storage.data_ptr() for base in bases), handle)

    @property
    def size(self) -> int:
        """Bytes of it."""
        return self.storage.numel()

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where a tensor lies in here, in bytes; None: elsewhere, or in a way that peers cannot store into."""
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        inside = self._first <= start and end <= self._end and tensor.numel() > 0
        return start - self._first if inside and start % _C.VECTOR_BYTES == 0 and tensor.is_contiguous() else None

    @property
    def next_offset(self) -> int:
        """Where the next tensor lies, in bytes."""
        return -(-self.used // ALIGNMENT) * ALIGNMENT

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor, for which there is room: its bytes are nobody else's from now on."""
        first = self.next_offset
        self.used = first + math.prod(shape) * dtype.itemsize
        return self.storage[first : self.used].view(dtype).view(tuple(shape))

    def close(self) -> None:
        """Let go of this rank's memory; tensors of it, and peers' mappings, keep it alive as long as they are."""
        handle, self._handle = self._handle, None
        self.storage = self.storage[:0]
        if isinstance(handle, ShmMemory):
            handle.close()
