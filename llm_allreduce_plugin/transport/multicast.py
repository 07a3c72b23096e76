"""Memory of which one store reaches every rank: a multicast object over the GPUs of a group, and its proof.

Ranks go through the driver's sequence in phases. After each they vote, so that what one rank cannot do, or does not
come back from, stops all alike: they then go without, and the reason is told. Nothing here waits inside the driver for
another rank.

The order is the driver's. Every GPU must be part of the object before memory is bound to it, and at the end it is
unmapped and unbound before the memory goes. Each rank keeps its handle until its end, the first one's included, which
must outlive every import.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.base.attempt import EndsWhenUnused
from llm_allreduce_plugin.base.cleanup import quietly
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.transport.driver import DriverError
from llm_allreduce_plugin.transport.mapped import let_go_of_unowned
from llm_allreduce_plugin.transport.multicast_driver import (
    ILLEGAL_STATE,
    NOT_READY,
    OUT_OF_MEMORY,
    MulticastDriver,
)
from llm_allreduce_plugin.transport.passing import ThroughSocket

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CLOSE_WAIT_S = 10.0
TRIES = 4  # of a phase in which the fabric is not ready on some rank
PAUSE_S = 0.25  # before the next of them, longer each time
_HINTS = {
    ILLEGAL_STATE: "the fabric manager may not have set up multicast",
    NOT_READY: "the fabric is not ready",
}


def _hint(error: DriverError, size: int) -> str:
    """What an error of the driver may mean; empty where nobody knows. ``size``: bytes of the object."""
    if error.status != OUT_OF_MEMORY:
        return _HINTS.get(error.status, "")
    if error.call.startswith("cuMulticast"):
        return "the switches may have no room left for another multicast object"
    return f"this GPU has no room for {size / (1 << 20):g} MiB more" if error.call == "cuMemCreate" else ""


class Multicast(EndsWhenUnused):
    """One rank's part of a multicast object. ``all``: where one store reaches every rank; ``own``: its own memory.

    ``size``: bytes of each; ``alignment``: what ``all`` is a multiple of.

    It ends when it has been closed and nothing uses it any more: a step that ranks have given up may still be on its
    way in the driver, or never return.
    """

    def __init__(self) -> None:
        super().__init__()
        self.all = self.own = self.size = self.alignment = 0
        self.driver: MulticastDriver | None = None
        self.handle: int | None = None
        self.memory: int | None = None
        self.bound = False
        self.way: ThroughSocket | None = None

    def close(self) -> None:
        """Let go of all of it, as soon as nothing uses it, and wait for that for a while. No kernel may be using it.

        Idempotent.
        """
        if not self._end("multicast", CLOSE_WAIT_S):
            logger.warning("the driver has not let go of multicast memory after %g s", CLOSE_WAIT_S)

    def withdraw(self) -> None:
        """Hand out the object no more: every rank has imported it."""
        way, self.way = self.way, None
        if way is not None:
            quietly(way.withdraw, "stop handing out a multicast object")

    def _let_go(self) -> None:
        self.withdraw()
        driver = self.driver
        if driver is None:
            return
        steps: list[tuple[Callable[[], object], str]] = []
        if self.all:
            steps.append((functools.partial(driver.unmap, self.all, self.size), "unmap multicast memory"))
        if self.bound and self.handle is not None:
            steps.append((functools.partial(driver.unbind, self.handle, self.size), "unbind multicast memory"))
        if self.handle is not None:
            steps.append((functools.partial(driver.release, self.handle), "let go of a multicast object"))
        if self.own:
            steps.append((functools.partial(driver.unmap, self.own, self.size), "unmap memory"))
        if self.memory is not None:
            steps.append((functools.partial(driver.release, self.memory), "let go of memory"))
        steps.append((driver.close, "let go of a CUDA context"))
        self.all = self.own = 0
        self.handle = self.memory = self.driver = None
        self.bound = False
        for step, what in steps:
            quietly(step, what)


class MulticastMemory:
    """One rank's part of a multicast object that serves calls; until nobody has it.

    Attributes:
        all: where one store reaches every rank.
        own: this rank's memory.
        size: bytes of each.
    """

    def __init__(self, made: Multicast, device: torch.device) -> None:
        self.all, self.own, self.size = made.all, made.own, made.size
        self._made: Multicast | None = made
        self._device = device

    def close(self) -> None:
        """Let go of all of it. No kernel may be using it. Idempotent."""
        made, self._made = self._made, None
        if made is not None:
            made.close()

    def __del__(self) -> None:
        made = getattr(self, "_made", None)
        if made is not None and not sys.is_finalizing():
            let_go_of_unowned(made, self._device)


@dataclasses.dataclass(frozen=True)
class _Offer:
    """How peers come by the first rank's object."""

    where: str = ""
    token: bytes = b""


class Opening:
    """The phases of one rank. ``driver``: opens that of this rank's GPU; it may block, like all calls of it.

    Args:
        steps: by which ranks vote; each has its own deadline.
        driver: see above.
        size: bytes that are wanted.
        prepare: writes what must be in this rank's memory first; takes its address.
        pause: waits so many seconds between two tries.
    """

    def __init__(
        self,
        steps: Agreement,
        driver: Callable[[], MulticastDriver],
        size: int,
        prepare: Callable[[int], None],
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._steps = steps
        self._open_driver = driver
        self._wanted = size
        self._prepare = prepare
        self._pause = pause
        self._made = Multicast()

    def open(self) -> Multicast:
        """All phases. Collective.

        Raises:
            TransportError: on every rank alike, with the reason; nothing is left behind.
        """
        made = self._made
        try:
            sizes = self._steps.gather(self._phase("to ask for multicast", self._ask), "to compare sizes")
            made.size = max(sizes)
            offered = self._phase("to make a multicast object", self._create)
            offers = self._steps.gather(offered, "to hand out the multicast object")
            self._phase("to import the multicast object", functools.partial(self._import, offers[0]))
            made.withdraw()
            self._phase("to add their GPUs to the multicast object", self._add)
            self._phase("to bind memory to the multicast object", self._bind)
            self._phase("to map multicast memory", self._map)
        except BaseException:
            made.close()
            raise
        return made

    def _phase(self, step: str, make: Callable[[MulticastDriver], Any]) -> Any:  # noqa: ANN401
        """``make`` on every rank, again on those where the fabric is not ready, all in step.

        Raises:
            TransportError: on every rank alike.
        """
        done: list[Any] = []

        def run() -> bool:
            with self._made.in_use():
                driver = self._made.driver
                if done:
                    return True
                try:
                    if driver is None:
                        self._made.driver = self._open_driver()
                    assert self._made.driver is not None
                    done.append(make(self._made.driver))
                except DriverError as error:
                    if error.status == NOT_READY and tries < TRIES:
                        return False
                    hint = _hint(error, self._made.size)
                    message = f"{error}; {hint}" if hint else str(error)
                    raise DriverError(message, error.status, error.call) from error
                return True

        for tries in range(1, TRIES + 1):
            here = self._steps.on_every_rank(run, step, TransportError, "cannot use multicast", may_block=True)
            if all(self._steps.gather(here, step)):
                break
            self._pause(PAUSE_S * tries)
        return done[0]

    def _ask(self, driver: MulticastDriver) -> int:
        if not driver.has_multicast:
            message = "the driver says that this GPU has no multicast"
            raise DriverError(message)
        self._made.alignment = driver.multicast_granularity(self._wanted, self._steps.world_size)
        return driver.multicast_rounded(self._wanted, self._steps.world_size)

    def _create(self, driver: MulticastDriver) -> _Offer:
        made = self._made
        if self._steps.rank != 0:
            return _Offer()
        if made.handle is None:
            made.handle = driver.create_multicast(made.size, self._steps.world_size)
        file = driver.export_file(made.handle)
        try:
            made.way = ThroughSocket()
            return _Offer(*made.way.hand_out(file))
        finally:
            os.close(file)

    def _import(self, offer: _Offer, driver: MulticastDriver) -> None:
        if self._steps.rank == 0:
            return
        try:
            file = ThroughSocket().fetch(offer.where, offer.token)
        except OSError as error:
            message = f"cannot get the object of rank 0 through a socket: {error}"
            raise DriverError(message) from error
        try:
            self._made.handle = driver.take_file(file)
        finally:
            os.close(file)

    def _add(self, driver: MulticastDriver) -> None:
        driver.add_device(self._handle)

    def _bind(self, driver: MulticastDriver) -> None:
        made = self._made
        if made.memory is None:
            made.memory = driver.create(made.size)
        driver.bind(self._handle, made.memory, made.size)
        made.bound = True

    def _map(self, driver: MulticastDriver) -> None:
        made = self._made
        assert made.memory is not None
        if not made.own:
            made.own = driver.map(made.memory, made.size)
            self._prepare(made.own)
        made.all = driver.map(self._handle, made.size, made.alignment)

    @property
    def _handle(self) -> int:
        assert self._made.handle is not None
        return self._made.handle
