"""GPU memory of every rank, mapped into every rank by the driver's calls.

Nothing here waits inside the driver for another rank, as a rendezvous does: ranks exchange what is exported through
their agreement, so that every step has its deadline, and what one rank cannot do stops all alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.base.attempt import EndsWhenUnused
from llm_allreduce_plugin.base.cleanup import Closable, quietly
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.driver import Driver
from llm_allreduce_plugin.transport.symmetric import initialize

logger = logging.getLogger(__name__)

CLOSE_WAIT_S = 10.0


class Handles(Protocol):
    """How memory of one process gets into another. An object serves one rank, once.

    Attributes:
        place: where the others are, to go before "can map".
        told: what ranks tell each other, to follow "to exchange".
    """

    place: str
    told: str

    def open(self, device: torch.device) -> Driver:
        """The driver of a rank's GPU, which makes memory that can be exported like this.

        Raises:
            RuntimeError: it cannot be, with the reason.
        """

    def export(self, driver: Driver, handle: int) -> Any:  # noqa: ANN401  (its own take knows what it is)
        """What peers need to take the memory: something that travels between processes.

        Raises:
            RuntimeError, OSError: with the reason.
        """

    def take(self, driver: Driver, exported: Any) -> int:  # noqa: ANN401
        """A handle of memory that a peer has exported.

        Raises:
            RuntimeError, OSError: with the reason.
        """

    def withdraw(self) -> None:
        """Every rank has taken what it needs, or none will."""


def driver_of(device: torch.device, handle_types: int, place: str) -> Driver:
    """The driver of a rank's GPU.

    Raises:
        RuntimeError: there is none, or ranks are not on GPUs.
    """
    if device.type != "cuda":
        message = f"a rank on {device.type} has no GPU memory that {place} could map"
        raise RuntimeError(message)
    torch.cuda.synchronize(device)  # torch makes the context that the driver's calls then share
    return Driver(device.index, handle_types=handle_types)


class Segment:
    """Memory of one rank, mapped here. ``handle``: of it, which this owns."""

    def __init__(self, driver: Driver, handle: int, size: int) -> None:
        self.driver = driver
        self.handle: int | None = handle
        self.size = size
        self.address = 0

    def map(self) -> None:
        """Give it an address.

        Raises:
            DriverError: with the reason.
        """
        assert self.handle is not None
        self.address = self.driver.map(self.handle, self.size)

    def close(self) -> None:
        """Unmap, and let go of the memory. Idempotent."""
        address, handle, self.address, self.handle = self.address, self.handle, 0, None
        if address:
            quietly(functools.partial(self.driver.unmap, address, self.size), "unmap memory of a rank")
        if handle is not None:
            quietly(functools.partial(self.driver.release, handle), "let go of memory of a rank")


class Mapped(EndsWhenUnused):
    """The memory of all ranks, as this one sees it.

    It ends when it has been closed and nothing uses it any more: a step that ranks have given up may still be on its
    way in the driver, or never return.
    """

    def __init__(self) -> None:
        super().__init__()
        self.driver: Driver | None = None
        self.segments: list[Segment] = []  # as they were made; in rank order in the end

    @property
    def bases(self) -> list[int]:
        """The address of each rank's, in rank order."""
        return [segment.address for segment in self.segments]

    def close(self) -> None:
        """Unmap all of it, as soon as nothing uses it, and wait for that for a while. No kernel may be running on it.

        Idempotent.
        """
        if not self._end("mapped", CLOSE_WAIT_S):
            logger.warning("the driver has not let go of memory of other ranks after %g s", CLOSE_WAIT_S)

    def _let_go(self) -> None:
        for segment in self.segments:
            segment.close()
        self.segments.clear()
        if self.driver is not None:
            quietly(self.driver.close, "let go of a CUDA context")


def share(
    agreement: Agreement,
    device: torch.device,
    size: int,
    prepare: Callable[[Driver, int], None],
    handles: Handles,
) -> Mapped:
    """``size`` bytes of every rank, mapped into every rank; prepared before any peer can see them. Collective.

    Args:
        agreement: of the ranks.
        device: this rank's.
        size: bytes of each rank, at least.
        prepare: writes what must be there first; takes the driver and the address.
        handles: how the memory gets to peers.

    Raises:
        TransportError: on every rank alike, when a rank cannot allocate, export, import or map.
    """
    mapped = Mapped()
    try:
        own = agreement.on_every_rank(
            lambda: _export(mapped, device, size, prepare, handles),
            "to allocate and export memory",
            TransportError,
            f"cannot allocate memory that {handles.place} can map",
            may_block=True,
        )
        exported = agreement.gather(own, f"to exchange {handles.told}")
        agreement.on_every_rank(
            lambda: _import(mapped, agreement, exported, handles),
            "to import memory",
            TransportError,
            "cannot map",
            may_block=True,
        )
    except BaseException:
        mapped.close()
        raise
    finally:
        handles.withdraw()
    return mapped


def _export(
    mapped: Mapped, device: torch.device, size: int, prepare: Callable[[Driver, int], None], handles: Handles
) -> tuple[Any, int]:
    """Make this rank's memory: what others need to map it, and its bytes."""
    let_go_of_dropped()  # it may be what this one needs
    with mapped.in_use():
        driver = mapped.driver = handles.open(device)
        length = driver.rounded(size)
        own = Segment(driver, driver.create(length), length)
        mapped.segments.append(own)
        own.map()
        prepare(driver, own.address)
        assert own.handle is not None
        return handles.export(driver, own.handle), length


def _import(mapped: Mapped, agreement: Agreement, exported: Sequence[tuple[Any, int]], handles: Handles) -> None:
    """Map the memory of all other ranks."""
    with mapped.in_use():
        driver, (own,) = mapped.driver, mapped.segments
        assert driver is not None
        found = []
        for rank, (what, length) in enumerate(exported):
            if rank == agreement.rank:
                found.append(own)
                continue
            try:
                segment = Segment(driver, handles.take(driver, what), length)
                mapped.segments.append(segment)
                segment.map()
            except (RuntimeError, OSError) as error:
                message = f"memory of {agreement.name_of(rank)}: {error}"
                raise RuntimeError(message) from error
            found.append(segment)
        mapped.segments[:] = found


class MappedMemory:
    """Memory of every rank, mapped into every rank; until nobody has it.

    Attributes:
        own: this rank's bytes; None once it is closed.
    """

    local = 0

    def __init__(self, mapped: Mapped, own: torch.Tensor, transport: Transport) -> None:
        self.transport = transport
        self.bases = mapped.bases
        self.own: torch.Tensor | None = own
        self._mapped = mapped

    def close(self) -> None:
        """Let go of this rank's mappings; those of peers keep their memory alive until they close, too."""
        self.own = None
        self._mapped.close()

    def __del__(self) -> None:
        own = getattr(self, "own", None)
        if own is not None and not sys.is_finalizing():
            let_go_of_unowned(self._mapped, own.device)


def let_go_of_unowned(memory: Closable, device: torch.device) -> None:
    """Let go of memory that nobody has any more, once no kernel may run on it.

    Where a graph may be captured it stays until :func:`let_go_of_dropped`: to wait for the GPU would end the capture.
    """
    if device.type == "cuda" and _may_be_capturing():
        _dropped.append((memory, device))
    else:
        _let_go_when_idle(memory, device)


def _may_be_capturing() -> bool:
    """Whether a graph is captured here. Of other threads nobody knows: so it may be, where this is not the main one."""
    if threading.current_thread() is not threading.main_thread():
        return True
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # of a context that has failed, in which nothing is captured
        return False


# Of objects that nobody had any more while a graph was captured. The end of the process lets go of it, too.
_dropped: deque[tuple[Closable, torch.device]] = deque()


def _let_go_when_idle(memory: Closable, device: torch.device) -> None:
    if device.type == "cuda":
        # A kernel may still be on its way. A context that an expired wait has ended has none.
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(device)
    memory.close()


def let_go_of_dropped() -> None:
    """Let go of memory that nobody has any more, but that was dropped while a graph was captured.

    It waits for the GPU: not to be called while a graph is captured.
    """
    while _dropped:
        with contextlib.suppress(IndexError):  # another thread was faster
            _let_go_when_idle(*_dropped.popleft())


def open_bytes(
    agreement: Agreement,
    device: torch.device,
    size: int,
    handles: Handles,
    begin: Callable[[torch.Tensor], None] = lambda _: None,
) -> tuple[Mapped, torch.Tensor]:
    """``size`` bytes of every rank, mapped into every rank; and this rank's, uint8[size]. Collective.

    ``begin``: writes to a rank's own what must be there before any peer can see it.

    Raises:
        TransportError: on every rank alike, when a rank cannot allocate or map.
    """

    def prepare(_driver: Driver, address: int) -> None:
        begin(bytes_at(address, size, device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    mapped = share(agreement, device, size, prepare, handles)
    try:
        return mapped, bytes_at(mapped.bases[agreement.rank], size, device)
    except BaseException:
        mapped.close()
        raise


def open_workspace(
    agreement: Agreement, device: torch.device, layout: _C.Layout, handles: Handles
) -> tuple[Mapped, torch.Tensor]:
    """The memory of a workspace of every rank, initialized. See :func:`open_bytes`."""
    return open_bytes(agreement, device, layout.total_bytes, handles, lambda own: initialize(own, layout))


class GpuBytes:
    """Bytes at an address of a GPU, as other libraries may take them over; they keep it as long as they have them."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 2}


def bytes_at(address: int, size: int, device: torch.device, keeps: object = None) -> torch.Tensor:
    """Memory at an address as uint8[size]. ``keeps``: what tensors of it keep alive; None: whoever calls does that."""
    owner: Any
    if device.type == "cuda":
        owner = GpuBytes(address, size)
        found = torch.as_tensor(owner, device=device)
    else:
        owner = (ctypes.c_ubyte * size).from_address(address)
        found = torch.frombuffer(owner, dtype=torch.uint8)
    owner.keeps = keeps
    return found
