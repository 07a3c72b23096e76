"""GPU memory that ranks of one host map: by files, which they send each other over sockets.

torch's symmetric memory does the same; but the first that a process asks it for takes 2 to 3 s on an H200, and no
deadline holds in its rendezvous. It is what is left where files cannot be sent: between containers that have a network
of their own each.
"""

from __future__ import annotations

import dataclasses
import logging
import os

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport import nameless, symmetric
from llm_allreduce_plugin.transport.driver import FILE_DESCRIPTOR, Driver
from llm_allreduce_plugin.transport.mapped import MappedMemory, driver_of, open_bytes, open_workspace
from llm_allreduce_plugin.transport.passing import ThroughSocket
from llm_allreduce_plugin.transport.symmetric import SymmetricMemory

logger = logging.getLogger("llm_allreduce_plugin")


def open_driver(device: torch.device) -> Driver:
    """The driver of a rank's GPU.

    Raises:
        RuntimeError: there is none, or ranks are not on GPUs.
    """
    return driver_of(device, FILE_DESCRIPTOR, FileHandles.place)


@dataclasses.dataclass(frozen=True)
class FileAddress:
    """Where peers get a rank's file.

    Attributes:
        where: a socket's abstract name.
        token: for whoever asks.
    """

    where: str
    token: bytes


def _hand_out(way: ThroughSocket, file: int) -> FileAddress:
    """Hand a file out from now on. Closes the descriptor.

    Raises:
        OSError: with the reason.
    """
    try:
        return FileAddress(*way.hand_out(file))
    finally:
        os.close(file)


def _fetch(address: FileAddress, whose: str) -> int:
    """A descriptor of a peer's file. ``whose``: for errors, ``"its file"``.

    Raises:
        RuntimeError: with the reason.
    """
    try:
        return ThroughSocket().fetch(address.where, address.token)
    except OSError as error:
        message = f"{whose} does not come through a socket: {error}"
        raise RuntimeError(message) from error


class FileHandles:
    """See :class:`~llm_allreduce_plugin.transport.mapped.Handles`."""

    place = "its peers"
    told = "where files of memory are handed out"

    def __init__(self) -> None:
        self._way = ThroughSocket()

    def open(self, device: torch.device) -> Driver:
        """A driver whose memory can be exported as a file."""
        return open_driver(device)

    def export(self, driver: Driver, handle: int) -> FileAddress:
        """Hand the file out from now on."""
        return _hand_out(self._way, driver.export_file(handle))

    def take(self, driver: Driver, exported: FileAddress) -> int:
        """Ask a peer for its file."""
        file = _fetch(exported, "its file")
        try:
            return driver.take_file(file)
        finally:
            os.close(file)

    def withdraw(self) -> None:
        """Hand the file out no more: it would hold the memory."""
        self._way.withdraw()


class PeerMemory(MappedMemory):
    """A workspace that the ranks of a host map."""

    @classmethod
    def open(cls, agreement: Agreement, device: torch.device, layout: _C.Layout) -> PeerMemory:
        """Collective.

        Raises:
            TransportError: on every rank alike, when a rank cannot allocate, send, or map.
        """
        return cls(*open_workspace(agreement, device, layout, FileHandles()), Transport.SYMMETRIC)


def sending_fault(agreement: Agreement) -> str | None:
    """Why ranks cannot send each other files, or None: each has asked each for one. Collective.

    The same on every rank.
    """
    way = ThroughSocket()
    # Of its own: a rank that is still on its way when another has failed is no reason to keep memory later.
    steps = agreement.nested(agreement.wait_s, agreement.setting, agreement.when)

    def offer() -> FileAddress:
        return _hand_out(way, nameless.create(os.sysconf("SC_PAGE_SIZE")))

    def fetch() -> None:
        for rank, address in enumerate(addresses):
            if rank != agreement.rank:
                os.close(_fetch(address, f"that of {agreement.name_of(rank)}"))

    try:
        mine = steps.on_every_rank(offer, "to hand out files", TransportError, "cannot hand out a file", may_block=True)
        addresses = steps.gather(mine, f"to exchange {FileHandles.told}")
        steps.on_every_rank(fetch, "to ask for files", TransportError, "cannot get a file", may_block=True)
    except TransportError as error:
        return str(error)
    finally:
        way.withdraw()
        steps.close()
    return None


def open_peer_memory(
    agreement: Agreement,
    group: dist.ProcessGroup,
    device: torch.device,
    layout: _C.Layout,
    rendezvous: symmetric.Rendezvous = symmetric.whole_group,
) -> PeerMemory | SymmetricMemory:
    """A workspace of the given layout on every rank of a host, mapped into each.

    Collective; ``agreement`` is of the ranks of ``group``, on which torch maps memory, or ``rendezvous`` does, where
    ranks cannot send each other files.

    Raises:
        TransportError: on every rank alike, when a rank cannot allocate or map.
    """
    fault = sending_fault(agreement)
    if fault is None:
        return PeerMemory.open(agreement, device, layout)
    if agreement.rank == 0:
        logger.info("memory of ranks is mapped by torch's symmetric memory: %s", fault)
    return SymmetricMemory.open(agreement, group, device, layout, rendezvous)


def is_by_files(memory: object) -> bool:
    """Whether a workspace's memory was mapped by files: then ranks can send each other more of them."""
    return isinstance(memory, PeerMemory)


def share_peer_bytes(
    agreement: Agreement, group: dist.ProcessGroup, device: torch.device, size: int, *, by_files: bool
) -> tuple[torch.Tensor, object, list[int]]:
    """``size`` bytes on every rank of a host, mapped into each: by files, else as torch does it. Collective.

    ``by_files``: as the workspace is, see :func:`is_by_files`.

    Returns:
        This rank's bytes, what keeps the mapping alive, and the address at which this rank sees each rank's.

    Raises:
        TransportError: on every rank alike, when a rank cannot allocate or map.
    """
    if not by_files:
        return symmetric.share(agreement, group, device, size)
    memory = MappedMemory(*open_bytes(agreement, device, size, FileHandles()), Transport.SYMMETRIC)
    assert memory.own is not None
    return memory.own, memory, memory.bases
