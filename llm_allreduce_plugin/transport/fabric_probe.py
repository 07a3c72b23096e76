"""The proof that ranks are in one NVLink domain: memory of each, exported, imported, written and read by all.

NVML's word is none: an H100 may call its fabric completed and be in no domain, and without an IMEX channel the driver
refuses the import. So what this finds is what counts, on all ranks alike, before anything relies on it.
"""

from __future__ import annotations

import os
import struct

import torch

from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import AllReduceError, TransportError
from llm_allreduce_plugin.transport.fabric import FabricHandles
from llm_allreduce_plugin.transport.mapped import share

PROBE_WAIT_S = 60.0  # for a step of the probe; a first context on a large machine takes some 10 s
_LIMIT = "a fixed limit of the probe"
_WHEN = "while the NVLink domain was being probed"
_WORD = struct.Struct("<QII")  # a number that the first rank draws, who wrote it, to whom


def domain_fault(agreement: Agreement, device: torch.device, *, wait_s: float = PROBE_WAIT_S) -> str | None:
    """Why memory cannot be shared over the NVLink domain that ranks seem to be in, or None. Collective.

    The same on every rank. Whatever the driver does, there is an answer after ``wait_s`` for each of the probe's few
    steps: it hangs in a thread of its own, and its memory is left to itself.

    Raises:
        StartError, StartTimeoutError: a rank has failed, or does not come at all.
    """
    inner = agreement.nested(min(wait_s, agreement.wait_s), _LIMIT, _WHEN)
    fault = None
    try:
        _probe(inner, device)
    except AllReduceError as error:
        fault = str(error)
    finally:
        inner.close()
    # Ranks may have given up at different steps; here all of them come to the same end.
    return agreement.first_fault(fault, "to agree on whether they are in one NVLink domain")


def _probe(agreement: Agreement, device: torch.device) -> None:
    """Write to every rank's memory over the domain, and read from it.

    Raises:
        TransportError: on every rank alike.
    """
    rank, ranks = agreement.rank, range(agreement.world_size)
    nonce = agreement.from_first_rank(
        lambda: int.from_bytes(os.urandom(8), "little"), "to draw a number", TransportError
    )
    zeros = bytes(_WORD.size * len(ranks))
    mapped = share(agreement, device, len(zeros), lambda driver, address: driver.write(address, zeros), FabricHandles())

    def write() -> None:
        with mapped.in_use():
            assert mapped.driver is not None
            for peer, base in enumerate(mapped.bases):
                mapped.driver.write(base + rank * _WORD.size, _WORD.pack(nonce, rank, peer))

    def check() -> None:
        with mapped.in_use():
            assert mapped.driver is not None
            here = mapped.driver.read(mapped.bases[rank], len(zeros))
            for peer, base in enumerate(mapped.bases):
                if here[peer * _WORD.size :][: _WORD.size] != _WORD.pack(nonce, peer, rank):
                    message = f"what rank {peer} wrote to rank {rank}'s memory over the NVLink domain did not arrive"
                    raise TransportError(message)
                if mapped.driver.read(base + rank * _WORD.size, _WORD.size) != _WORD.pack(nonce, rank, peer):
                    message = f"rank {rank} reads something else from rank {peer}'s memory than it wrote there"
                    raise TransportError(message)

    try:
        step = "to prove that the NVLink domain carries bytes"
        agreement.on_every_rank(write, step, TransportError, "cannot write to its peers' memory", may_block=True)
        # Nobody unmaps before all have looked.
        agreement.on_every_rank(check, step, TransportError, "cannot use its peers' memory", may_block=True)
    finally:
        mapped.close()
