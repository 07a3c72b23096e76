"""Registered memory: one pool on every rank, which all peers have mapped, for outputs that peers store into.

It is opened at the start and never grows: peers could not map more of it while one of them waits in a call, or captures
a graph. What is taken from it is a tensor like any other: when the last reference to it goes, its bytes are free again.
Ranks need not free in the same order, for where an output lies they tell each other in every call
(csrc/protocol/place.h).
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.mapped import GpuBytes
from llm_allreduce_plugin.transport.peer import share_peer_bytes
from llm_allreduce_plugin.transport.shm import PAGE_BYTES, ShmMemory

ALIGNMENT = 512  # as torch allocates, in bytes; whole cache lines
_ANY_CAPTURE = 1
CAPTURED_SHARE = 2  # graphs may keep one part in so many of what tensors are taken from


@functools.lru_cache(maxsize=256)
def _host_bytes(size: int) -> Any:  # noqa: ANN401
    """The type of so many bytes of the host. A class of ours: objects of ctypes' own tell nobody when they go."""
    return type("HostBytes", (ctypes.c_uint8 * size,), {})


class RegisteredPool:
    """Memory of this rank that all peers have mapped, and they theirs.

    Args and attributes:
        storage: its bytes.
        bases: where this rank sees each rank's, in rank order.
        handle: keeps the mapping alive.
        largest: bytes that are kept for :meth:`lend`.

    Attributes:
        taken: tensors that were taken from it.
        lent: tensors that were not, because nothing was free.
        graphs_share: graphs take turns with the bytes that they have taken, as graphs of one memory pool of torch's do.
    """

    def __init__(self, storage: torch.Tensor, bases: Sequence[int], handle: object, largest: int) -> None:
        self._storage: torch.Tensor | None = storage
        self._handle: object | None = handle
        self.bases = tuple(bases)
        self.size = storage.numel()
        self.device = storage.device
        self._kept = (self.size - largest) // ALIGNMENT * ALIGNMENT  # from where on
        self.taken = self.lent = 0
        self._first = storage.data_ptr()
        self._lock = threading.Lock()
        # Free blocks, in rising order: [first, end) in bytes from the start. Behind them lies what is lent.
        self._free: list[tuple[int, int]] = [(0, self._kept)]
        self._released: deque[tuple[int, int, int]] = deque()  # by finalizers, of any thread
        # Blocks of the graph that is being captured. They stay with it: replays write there, whatever else lives then.
        self._capture = 0
        self._free_in_capture: list[tuple[int, int]] = []
        self._captured_bytes = 0
        self.graphs_share = False
        self._lent_on: int | None = None  # by eager calls
        self._lent_in = (0, 0)  # by captured ones: the capture, and the stream
        self._copied: dict[bool, torch.cuda.Event] = {}  # what was lent last; of captured calls, and of others

    @classmethod
    def open(
        cls,
        agreement: Agreement,
        group: dist.ProcessGroup,
        device: torch.device,
        transport: Transport,
        size: int,
        largest: int,
        *,
        by_files: bool,
    ) -> RegisteredPool:
        """``size`` bytes on every rank, ``largest`` of them for :meth:`lend`. Collective.

        They are the GPUs' own memory, ``by_files`` or by torch, as the workspace; or shared memory of CPU ranks.

        Raises:
            TransportError: on every rank alike, when a rank cannot allocate or map.
        """
        if transport is Transport.SHM:
            shared = ShmMemory.open(agreement, math.ceil(size / PAGE_BYTES) * PAGE_BYTES)
            first = shared.bases[agreement.rank] - shared.address
            # A tensor keeps the mapping, whoever closes it.
            storage = torch.frombuffer(shared.buffer, dtype=torch.uint8, count=size, offset=first)
            return cls(storage, shared.bases, shared, largest)
        storage, handle, bases = share_peer_bytes(agreement, group, device, size, by_files=by_files)
        return cls(storage, bases, handle, largest)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether peers can store into ``tensor``: it lies in here, contiguous, from a multiple of 16 bytes on."""
        start = tensor.data_ptr() - self._first
        inside = start >= 0 and start + tensor.numel() * tensor.element_size() <= self.size and tensor.numel() > 0
        return inside and start % _C.VECTOR_BYTES == 0 and tensor.is_contiguous()

    def take(self, shape: Sequence[int], dtype: torch.dtype, capture: int = 0) -> torch.Tensor | None:
        """A tensor whose bytes are nobody else's while it lives; None: nothing that large is free.

        ``capture``: a number for the graph that is being captured, which keeps the bytes for ever; 0: none.
        """
        size = _aligned(math.prod(shape) * dtype.itemsize)
        if capture and self.graphs_share:
            capture = _ANY_CAPTURE
        with self._lock:
            self._collect(capture)
            first = self._first_fit(size, capture)
        if first is None:
            return None
        self.taken += 1
        return self._tensor(first, size, capture, shape, dtype)

    def lend(self, shape: Sequence[int], dtype: torch.dtype, stream: int, capture: int = 0) -> torch.Tensor:
        """A tensor of at most ``largest`` bytes for one call, whose result is copied right behind it, on its stream.

        Whoever has copied it says so: :meth:`copied`. Where it was lent on another stream, this one waits for that
        copy: peers may store the next result only when the call that it is for has begun.
        """
        if capture:
            elsewhere = self._lent_in[0] == capture and self._lent_in[1] != stream
        else:
            elsewhere = self._lent_on not in (None, stream)
        if elsewhere and (event := self._copied.get(capture != 0)) is not None:
            event.wait(torch.cuda.current_stream(self.device))
        if capture:
            self._lent_in = (capture, stream)
        else:
            self._lent_on = stream
        self.lent += 1
        size = math.prod(shape) * dtype.itemsize
        assert self._storage is not None
        return self._storage[self._kept :][:size].view(dtype).view(tuple(shape))

    def copied(self, capture: int = 0) -> None:
        """What was lent has been copied by all that stands on the current stream so far."""
        if self.device.type == "cuda":
            # Of a captured call one of its own: a graph keeps what was recorded in it.
            made: torch.cuda.Event | None = None if capture else self._copied.get(False)
            event = made or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            self._copied[capture != 0] = event

    def _collect(self, capture: int) -> None:
        """What has been released since; those of graphs that have been captured stay with them."""
        if capture not in (0, self._capture):
            self._capture = capture
            self._free_in_capture.clear()
        while self._released:
            first, end, of_capture = self._released.popleft()
            if of_capture == 0:
                _put(self._free, first, end)
            elif of_capture == self._capture:
                _put(self._free_in_capture, first, end)

    def _first_fit(self, size: int, capture: int) -> int | None:
        if capture == 0:
            return _cut(self._free, size)
        if (first := _cut(self._free_in_capture, size)) is not None:
            return first
        if self._captured_bytes + size > self._kept // CAPTURED_SHARE:
            return None
        if (first := _cut(self._free, size)) is not None:
            self._captured_bytes += size
        return first

    def _tensor(self, first: int, size: int, capture: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        address = self._first + first
        if self.device.type == "cuda":
            owner: Any = GpuBytes(address, size)
            whole = torch.as_tensor(owner, device=self.device)
        else:
            owner = _host_bytes(size).from_address(address)
            whole = torch.frombuffer(owner, dtype=torch.uint8)
        assert whole.data_ptr() == address, "torch must take the bytes over as they lie"
        finalizer = weakref.finalize(owner, self._released.append, (first, first + size, capture))
        finalizer.atexit = False
        owner.pool = self._handle, self._storage  # mapped as long as a tensor lies there
        return whole[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))

    def use(self) -> dict[str, int]:
        """For a report: its size in bytes, and what became of outputs, those of captured calls among them."""
        return {"bytes": self.size, "stayed": self.taken, "copied_out": self.lent}

    def close(self) -> None:
        """Let go of this rank's memory. Tensors of it, and peers' mappings, keep it as long as they are."""
        self._handle = self._storage = None


def _aligned(size: int) -> int:
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


def _cut(blocks: list[tuple[int, int]], size: int) -> int | None:
    """Take ``size`` bytes from the first block that has them; where they begin."""
    for place, (first, end) in enumerate(blocks):
        if end - first >= size:
            blocks[place : place + 1] = [(first + size, end)] if end - first > size else []
            return first
    return None


def _put(blocks: list[tuple[int, int]], first: int, end: int) -> None:
    """Give a block back, as one with its neighbours."""
    place = bisect.bisect(blocks, (first, end))
    if place < len(blocks) and blocks[place][0] == end:
        end = blocks.pop(place)[1]
    if place and blocks[place - 1][1] == first:
        first = blocks.pop(place - 1)[0]
        place -= 1
    blocks.insert(place, (first, end))
