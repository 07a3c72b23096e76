"""Workspaces of GPU ranks in host memory that all GPUs of the node see: for nodes without peer access.

POSIX shared memory, pinned by every rank once and mapped into its GPU's address space. What only one rank touches
(epochs, the abort word) lies in that GPU's own memory instead: every access over PCIe takes a microsecond.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.agreement import on_every_rank
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.memory.shm import ShmMemory
from llm_allreduce_plugin.memory.symmetric import initialize
from llm_allreduce_plugin.selection.facts import Transport

PAGE_BYTES = 4096


class HostMemory:
    """A workspace of the given layout for every rank, initialized, pinned and visible to every rank's GPU."""

    transport = Transport.HOST

    def __init__(self, shared: ShmMemory, bases: list[int], local: torch.Tensor) -> None:
        self._shared: ShmMemory | None = shared
        self._local: torch.Tensor | None = local
        self.bases = bases
        self.local = local.data_ptr()

    @classmethod
    def open(cls, control_group: dist.ProcessGroup, device: torch.device, layout: _C.Layout) -> HostMemory:
        """Collective over ``control_group``.

        Raises:
            TransportError: on every rank alike, when a rank cannot map or pin the memory.
        """
        rank, world_size = dist.get_rank(control_group), dist.get_world_size(control_group)
        bytes_per_rank = -(-layout.total_bytes // PAGE_BYTES) * PAGE_BYTES
        shared = ShmMemory.open(control_group, bytes_per_rank)

        def pin() -> HostMemory:
            own = (ctypes.c_uint8 * layout.total_bytes).from_address(shared.bases[rank])
            initialize(torch.frombuffer(own, dtype=torch.uint8), layout)
            with torch.cuda.device(device):
                local = torch.zeros(layout.local_bytes, dtype=torch.uint8, device=device)
                torch.cuda.synchronize(device)
                seen = _C.host_register(shared.address, bytes_per_rank * world_size)
            return cls(shared, [seen + peer * bytes_per_rank for peer in range(world_size)], local)

        try:
            return on_every_rank(pin, control_group, TransportError, "cannot pin shared host memory")
        except TransportError:
            shared.close()
            raise

    def close(self) -> None:
        """Unpin and unmap; peers keep theirs. No kernel may be running on it."""
        if self._shared is not None:
            # A CUDA context that an expired wait has ended cannot unpin, nor need it.
            with contextlib.suppress(RuntimeError):
                _C.host_unregister(self._shared.address)
            self._shared.close()
            self._shared = None
        self._local = None

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()  # pages must be unpinned before they are unmapped
