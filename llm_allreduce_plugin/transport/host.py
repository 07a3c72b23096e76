"""Workspaces of GPU ranks in host memory that all GPUs of the node see: for nodes without peer access.

Shared memory, pinned by every rank once and mapped into its GPU's address space. What only one rank touches (epochs,
the abort word) lies in that GPU's own memory instead: every access over PCIe takes a microsecond.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.base.cleanup import let_go
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.shm import PAGE_BYTES, ShmMemory
from llm_allreduce_plugin.transport.symmetric import initialize


class HostMemory:
    """A workspace of the given layout for every rank, initialized, pinned and visible to every rank's GPU."""

    transport = Transport.HOST

    def __init__(self, shared: ShmMemory) -> None:
        self._shared: ShmMemory | None = shared
        self._local: torch.Tensor | None = None
        self._pinned = 0  # the address; 0: not pinned
        self.bases: list[int] = []
        self.local = 0

    @classmethod
    def open(cls, agreement: Agreement, device: torch.device, layout: _C.Layout) -> HostMemory:
        """Collective.

        Raises:
            TransportError: on every rank alike, when a rank cannot map or pin the memory.
        """
        bytes_per_rank = -(-layout.total_bytes // PAGE_BYTES) * PAGE_BYTES
        shared = ShmMemory.open(agreement, bytes_per_rank)
        memory = cls(shared)
        try:
            agreement.on_every_rank(
                lambda: memory._pin(agreement.rank, agreement.world_size, bytes_per_rank, device, layout),
                "to pin shared memory",
                TransportError,
                "cannot pin shared host memory",
                may_block=True,
            )
        except BaseException:
            let_go(memory, in_use=agreement.abandoned)
            raise
        return memory

    def _pin(self, rank: int, world_size: int, bytes_per_rank: int, device: torch.device, layout: _C.Layout) -> None:
        assert self._shared is not None
        own = (ctypes.c_uint8 * layout.total_bytes).from_address(self._shared.bases[rank])
        initialize(torch.frombuffer(own, dtype=torch.uint8), layout)
        with torch.cuda.device(device):
            self._local = torch.zeros(layout.local_bytes, dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
            seen = _C.host_register(self._shared.address, bytes_per_rank * world_size)
        self._pinned = self._shared.address
        self.bases = [seen + peer * bytes_per_rank for peer in range(world_size)]
        self.local = self._local.data_ptr()

    def close(self) -> None:
        """Unpin, then unmap; peers keep theirs. No kernel may be running on it."""
        if self._pinned:
            address, self._pinned = self._pinned, 0
            # A CUDA context that an expired wait has ended cannot unpin, nor need it.
            with contextlib.suppress(RuntimeError):
                _C.host_unregister(address)
        if self._shared is not None:
            shared, self._shared = self._shared, None
            shared.close()
        self._local = None

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()  # pages must be unpinned before they are unmapped
