"""Proof that one store reaches every rank: bytes through the driver, before any kernel relies on it.

A kernel whose stores do not arrive costs ranks their GPUs, a copy of the driver costs nothing. That it takes copies to
multicast memory is nowhere promised: where it refuses one, that is told, and is no word of what kernels can do.
"""

from __future__ import annotations

import time

from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.transport.driver import DriverError
from llm_allreduce_plugin.transport.multicast import Multicast

PROBE_WAIT_S = 5.0  # for what peers have stored to arrive
REFUSED = "the driver refuses copies to multicast memory, by which it is proved: of stores of kernels nothing is known"


def probe(steps: Agreement, made: Multicast, nonce: int, wait_s: float = PROBE_WAIT_S) -> None:
    """Every rank stores bytes of its own where they reach all, and all look for them. Collective.

    What lay there is put back.

    Raises:
        TransportError: on every rank alike, naming whose bytes did not arrive where.
    """
    length = 16
    before = bytearray()

    def word(rank: int) -> bytes:
        return (nonce * 0x9E3779B97F4A7C15 + rank + 1).to_bytes(24, "little")[:length]

    def begin() -> None:
        with made.in_use():
            driver = made.driver
            assert driver is not None
            before.extend(driver.read(made.own, length * steps.world_size))

    def write() -> None:
        with made.in_use():
            driver = made.driver
            assert driver is not None
            try:
                driver.write(made.all + length * steps.rank, word(steps.rank))
            except DriverError as error:
                message = f"{error}; {REFUSED}"
                raise DriverError(message, error.status, error.call) from error

    def look() -> None:
        with made.in_use():
            driver = made.driver
            assert driver is not None
            deadline = time.monotonic() + wait_s
            while True:
                seen = driver.read(made.own, length * steps.world_size)
                missing = [
                    rank for rank in range(steps.world_size) if seen[length * rank : length * (rank + 1)] != word(rank)
                ]
                if not missing:
                    return
                if time.monotonic() > deadline:
                    message = f"what rank {missing[0]} stored to all did not arrive"
                    raise DriverError(message)
                time.sleep(0.001)

    def restore() -> None:
        with made.in_use():
            driver = made.driver
            assert driver is not None
            driver.write(made.own, bytes(before))

    failed = "cannot use multicast"
    # None writes before all have read what lay there.
    for make, step in ((begin, "to begin"), (write, "to store to all in"), (look, "to look in"), (restore, "to end")):
        steps.on_every_rank(make, f"{step} the proof of multicast", TransportError, failed, may_block=True)
