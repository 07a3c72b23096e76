"""Ranks that send each other memory as files, on a driver that may fail.

The driver is :mod:`tests.support.fake_fabric`, and memory files of this machine; the code in between is real.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator
from unittest import mock

import torch

from llm_allreduce_plugin.transport import mapped, peer
from llm_allreduce_plugin.transport.driver import FILE_DESCRIPTOR, Driver
from llm_allreduce_plugin.transport.passing import ThroughSocket
from tests.support.fake_fabric import FakeEntryPoints, Fault, Truth

RANKS = 3
CPU = torch.device("cpu")
WAIT_S = 1.5


@dataclasses.dataclass(frozen=True)
class Scenario(Fault):
    """What goes wrong. ``deaf``: this rank gets no file through a socket."""

    deaf: int = -1

    def entry_points(self, rank: int) -> FakeEntryPoints:
        """Of a rank whose GPU is in no NVLink domain."""
        return FakeEntryPoints(Truth(None, handles=False), self.on(rank))


@contextlib.contextmanager
def driver_of(entry_points: FakeEntryPoints, *, deaf: bool = False) -> Iterator[None]:
    """These instead of the driver's; ``deaf``: this rank gets no file through a socket."""

    def fetch(_self: ThroughSocket, _where: str, _token: bytes) -> int:
        raise ConnectionRefusedError(111, "Connection refused")

    silence = mock.patch.object(ThroughSocket, "fetch", fetch) if deaf else contextlib.nullcontext()

    def open_driver(_device: torch.device) -> Driver:
        return Driver(0, entry_points, FILE_DESCRIPTOR)

    opened = mock.patch.object(peer, "open_driver", open_driver)
    with opened, silence, mock.patch.object(mapped, "CLOSE_WAIT_S", WAIT_S):
        yield


def open_count() -> int:
    """Files of this process."""
    return len(os.listdir("/proc/self/fd"))


def passing_threads() -> int:
    """Threads that hand files to peers."""
    return sum(thread.name == "llm-allreduce-passing" for thread in threading.enumerate())
