"""Shared host memory: one POSIX shared-memory file, mapped by every rank and unlinked at once."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
from pathlib import Path

import torch.distributed as dist

from llm_allreduce_plugin.agreement import first_fault
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.selection.facts import Transport

SHM_FOLDER = Path("/dev/shm")  # noqa: S108  (POSIX shared memory is the point)


class ShmMemory:
    """Shared memory of ``world_size * bytes_per_rank`` bytes, zeroed.

    The file is readable by its owner only and has no name once every rank has mapped it, so a crash leaves nothing
    behind.
    """

    transport = Transport.SHM
    local = 0

    def __init__(self, mapping: mmap.mmap, bytes_per_rank: int, world_size: int) -> None:
        self._mapping: mmap.mmap | None = mapping
        self._view: ctypes.c_char | None = ctypes.c_char.from_buffer(mapping)
        self.address = ctypes.addressof(self._view)
        self.bases = [self.address + rank * bytes_per_rank for rank in range(world_size)]

    @classmethod
    def open(cls, group: dist.ProcessGroup, bytes_per_rank: int) -> ShmMemory:
        """Collective over ``group``.

        Raises:
            TransportError: on every rank alike, when any rank cannot map the file (``/dev/shm`` too small, ranks on
                different hosts or in containers that do not share IPC).
        """
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        total = bytes_per_rank * world_size
        path: Path | None = None
        error: str | None = None
        mapping: mmap.mmap | None = None
        try:
            if rank == 0:
                path = SHM_FOLDER / f"llm-allreduce-{os.getpid()}-{secrets.token_hex(8)}"
                try:
                    _create(path, total)
                except OSError as failure:
                    error = f"rank 0 cannot create {total} bytes of shared memory in {SHM_FOLDER}: {failure.strerror}"
            offer = [str(path), error]
            dist.broadcast_object_list(offer, src=dist.get_global_rank(group, 0), group=group)
            if offer[1] is None:
                try:
                    mapping = _open(Path(str(offer[0])), total, rank * bytes_per_rank, bytes_per_rank)
                except OSError as failure:
                    error = f"rank {rank} cannot map {total} bytes of shared memory in {SHM_FOLDER}: {failure.strerror}"
                    error += "" if rank == 0 else " (other IPC namespace?)"
            # Nobody goes on before all have mapped it: the file loses its name next.
            error = first_fault(error, group)
        finally:
            if path is not None:
                path.unlink(missing_ok=True)
        if error is not None:
            if mapping is not None:
                mapping.close()
            raise TransportError(error)
        assert mapping is not None
        return cls(mapping, bytes_per_rank, world_size)

    def close(self) -> None:
        """Unmap. The memory goes when the last rank has."""
        self._view = None
        if self._mapping is not None:
            # BufferError: a traceback somewhere still holds the view; the mapping goes with it.
            with contextlib.suppress(BufferError):
                self._mapping.close()
            self._mapping = None


def _create(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def _open(path: Path, size: int, first: int, length: int) -> mmap.mmap:
    """The whole file, of which this rank takes the pages of its own part now.

    So a full /dev/shm is an error here, not a SIGBUS in the middle of a sum, and each part lies in memory near the rank
    that writes it.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, first, length)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
