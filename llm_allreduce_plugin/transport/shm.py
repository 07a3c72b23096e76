"""Shared host memory: one file without a name, mapped by every rank."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import secrets
from collections.abc import Sequence

from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.base.cleanup import quietly
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport import nameless
from llm_allreduce_plugin.transport.passing import Offer, Way, all_ways

PAGE_BYTES = 4096
_MARK_BYTES = 16


class ShmMemory:
    """Shared memory of ``world_size * bytes_per_rank`` bytes, zeroed.

    The file is its owner's only and never has a name, so that whatever ends a rank at whatever moment leaves nothing
    behind. (Where ranks share nothing but ``/dev/shm`` it has one for a moment, see :mod:`.passing`.)

    Attributes:
        address: where this process sees it.
        bases: where this process sees each rank's part, in rank order.
        buffer: its bytes.
    """

    transport = Transport.SHM
    local = 0

    def __init__(self, mapping: mmap.mmap, bytes_per_rank: int, world_size: int) -> None:
        self._mapping: mmap.mmap | None = mapping
        self._view: ctypes.c_char | None = ctypes.c_char.from_buffer(mapping)
        self.address = ctypes.addressof(self._view)
        self.bases = [self.address + rank * bytes_per_rank for rank in range(world_size)]

    @property
    def buffer(self) -> mmap.mmap:
        """Its bytes, until it is closed."""
        assert self._mapping is not None
        return self._mapping

    @classmethod
    def open(cls, agreement: Agreement, bytes_per_rank: int, *, ways: Sequence[Way] | None = None) -> ShmMemory:
        """Collective.

        Args:
            agreement: of the ranks.
            bytes_per_rank: of each rank's part.
            ways: how peers may come by rank 0's file (default: all ways); the first that works for all is taken.

        Raises:
            TransportError: on every rank alike, when any rank cannot map the file (too little memory, ranks on
                different hosts or in containers that share no namespace).
        """
        rank, world_size = agreement.rank, agreement.world_size
        size = bytes_per_rank * world_size
        total = size + PAGE_BYTES  # a page for the proof
        descriptor = -1
        mapping: mmap.mmap | None = None
        try:
            descriptor = _received(agreement, total, all_ways() if ways is None else ways)

            def make() -> mmap.mmap:
                nameless.reserve(descriptor, rank * bytes_per_rank, bytes_per_rank)
                return mmap.mmap(descriptor, total)

            what = f"cannot map {total} bytes of shared memory"
            mapping = agreement.on_every_rank(make, "to map shared memory", TransportError, what)
            _prove(agreement, mapping, size)
        except BaseException:
            if mapping is not None:
                quietly(mapping.close, "unmap shared memory")
            raise
        finally:
            if descriptor >= 0:
                quietly(lambda: os.close(descriptor), "close a file of shared memory")
        return cls(mapping, bytes_per_rank, world_size)

    def close(self) -> None:
        """Unmap. The memory goes when the last rank has."""
        self._view = None
        if self._mapping is not None:
            # BufferError: a traceback somewhere still holds the view; the mapping goes with it.
            with contextlib.suppress(BufferError):
                self._mapping.close()
            self._mapping = None


def _received(agreement: Agreement, total: int, ways: Sequence[Way]) -> int:
    """A descriptor of one file of ``total`` bytes that rank 0 has made, on every rank. Collective.

    Raises:
        TransportError: on every rank alike.
    """
    reasons: list[str] = []
    for way in ways:
        try:
            descriptor, fault = _received_by(way, agreement, total)
        except TransportError as error:  # there is no file to pass on
            reasons.append(str(error))
            break
        if fault is None:
            return descriptor
        reasons.append(fault)
    message = "; ".join(reasons)
    if len(reasons) == len(ways):
        message += " (containers that share neither /dev/shm nor a namespace? Start them with --ipc=host)"
    raise TransportError(message)


def _received_by(way: Way, agreement: Agreement, total: int) -> tuple[int, str | None]:
    """The same by one way; the second is why a rank did not get it."""
    opened: list[int] = []
    kept = False

    def offer() -> Offer:
        try:
            opened.append(way.create(total))
            return way.offer(opened[0])
        except OSError as error:
            message = f"rank 0 cannot create {total} bytes of shared memory: {error.strerror or error}"
            raise TransportError(message) from error

    try:
        offered = agreement.from_first_rank(offer, "to create shared memory", TransportError)
        fault = None
        if agreement.rank != 0:
            try:
                opened.append(way.receive(offered))
            except OSError as error:
                fault = f"rank {agreement.rank} {way.text}: {error.strerror or error}"
        # Nobody goes on before all have it: the offer ends next.
        fault = agreement.first_fault(fault, "to open shared memory")
        kept = fault is None
        return (opened[0] if kept else -1), fault
    finally:
        quietly(way.withdraw, "withdraw an offer of shared memory")
        for descriptor in [] if kept else opened:
            quietly(functools.partial(os.close, descriptor), "close a file of shared memory")


def _prove(agreement: Agreement, mapping: mmap.mmap, first: int) -> None:
    """Every rank writes a mark and finds those of the others. Collective.

    Raises:
        TransportError: on every rank alike.
    """
    rank, mark = agreement.rank, secrets.token_bytes(_MARK_BYTES)
    mapping[first + rank * _MARK_BYTES : first + (rank + 1) * _MARK_BYTES] = mark
    marks = agreement.gather(mark, "to write to shared memory")
    lost = [peer for peer, mark in enumerate(marks) if mapping[first + peer * _MARK_BYTES :][:_MARK_BYTES] != mark]
    fault = f"rank {rank} does not see what rank {lost[0]} wrote to shared memory" if lost else None
    if (fault := agreement.first_fault(fault, "to read shared memory")) is not None:
        raise TransportError(fault)
