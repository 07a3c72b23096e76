"""GPU memory that ranks on several hosts of one NVLink domain map: by fabric handles, which are only bytes."""

from __future__ import annotations

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.driver import FABRIC_HANDLE, Driver
from llm_allreduce_plugin.transport.mapped import MappedMemory, driver_of, open_workspace


def open_driver(device: torch.device) -> Driver:
    """The driver of a rank's GPU.

    Raises:
        RuntimeError: there is none, or ranks are not on GPUs.
    """
    return driver_of(device, FABRIC_HANDLE, FabricHandles.place)


class FabricHandles:
    """See :class:`~llm_allreduce_plugin.transport.mapped.Handles`."""

    place = "other hosts"
    told = "fabric handles"

    def open(self, device: torch.device) -> Driver:
        """A driver that has fabric handles for this GPU."""
        driver = open_driver(device)
        if not driver.has_fabric_handles:
            driver.close()
            message = "the driver has no fabric handles for this GPU"
            raise RuntimeError(message)
        return driver

    def export(self, driver: Driver, handle: int) -> bytes:
        """The fabric handle."""
        return driver.export(handle)

    def take(self, driver: Driver, exported: bytes) -> int:
        """By a fabric handle."""
        return driver.take(exported)

    def withdraw(self) -> None:
        """Nothing: a handle is for whoever has it."""


class FabricMemory(MappedMemory):
    """A workspace that the ranks of an NVLink domain map, on several hosts."""

    @classmethod
    def open(
        cls,
        agreement: Agreement,
        device: torch.device,
        layout: _C.Layout,
        transport: Transport = Transport.SYMMETRIC,
    ) -> FabricMemory:
        """Collective. ``transport``: what kernels take it for, which is SHM only where CPU ranks stand in for GPUs.

        Raises:
            TransportError: on every rank alike, when a rank cannot allocate or map.
        """
        return cls(*open_workspace(agreement, device, layout, FabricHandles()), transport)
