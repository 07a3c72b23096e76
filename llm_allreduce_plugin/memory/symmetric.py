"""Workspaces of GPU ranks: peer memory over NVLink or PCIe P2P, through torch's symmetric memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.agreement import first_fault, on_every_rank
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.selection.facts import Transport

_MULTICAST_SWITCH = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


@contextlib.contextmanager
def without_multicast() -> Iterator[None]:
    """Torch creates a multicast object for every rendezvous unless told not to; no kernel here uses one yet.

    So none is made, whatever NCCL_NVLS_ENABLE and TORCH_SYMM_MEM_DISABLE_MULTICAST say.
    """
    before = os.environ.get(_MULTICAST_SWITCH)
    os.environ[_MULTICAST_SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_MULTICAST_SWITCH]
        else:
            os.environ[_MULTICAST_SWITCH] = before


def initialize(buffer: torch.Tensor, layout: _C.Layout) -> None:
    """The state before the first call: zeros, and in the slots of an in-band layout the marker."""
    buffer.zero_()
    marker = _C.IN_BAND_MARKER - (1 << 32)  # as a signed word
    end = layout.flagged.one_shot_offset or layout.total_bytes  # flagged slots come next
    buffer[layout.in_band.one_shot_offset or end : end].view(torch.int32).fill_(marker)


def share(
    group: dist.ProcessGroup,
    control_group: dist.ProcessGroup,
    device: torch.device,
    size: int,
    prepare: Callable[[torch.Tensor], None] = lambda _: None,
) -> tuple[torch.Tensor, object, list[int]]:
    """``size`` bytes on every rank, mapped into every rank; prepared before any peer can see them. Collective.

    Returns:
        This rank's bytes, what keeps the mapping alive, and the address at which this rank sees each rank's.

    Raises:
        TransportError: on every rank alike, when a rank cannot allocate or map.
    """

    def make() -> tuple[torch.Tensor, object, list[int]]:
        with without_multicast(), torch.cuda.device(device):
            buffer = symm_mem.empty(size, dtype=torch.uint8, device=device)
            prepare(buffer)
            torch.cuda.synchronize(device)
            handle = symm_mem.rendezvous(buffer, group)
            return buffer, handle, [int(base) for base in handle.buffer_ptrs]

    return on_every_rank(make, control_group, TransportError, "cannot map its peers' memory")


class SymmetricMemory:
    """A workspace of the given layout on every rank, initialized, mapped into every rank.

    torch allocates it with the driver's virtual memory calls, outside the caching allocator and outside any pool that
    an engine frees (sleep mode) or that expandable segments would make unshareable.
    """

    transport = Transport.SYMMETRIC
    local = 0

    def __init__(self, buffer: torch.Tensor, handle: object, bases: list[int]) -> None:
        self._buffer: torch.Tensor | None = buffer
        self._handle: object | None = handle
        self.bases = bases

    @classmethod
    def open(
        cls, group: dist.ProcessGroup, control_group: dist.ProcessGroup, device: torch.device, layout: _C.Layout
    ) -> SymmetricMemory:
        """Collective over ``group``; ``control_group`` has the same ranks and carries Python objects.

        Raises:
            TransportError: on every rank alike, when a rank cannot allocate or map.
        """
        return cls(*share(group, control_group, device, layout.total_bytes, lambda buffer: initialize(buffer, layout)))

    def close(self) -> None:
        """Let go of this rank's memory; peers' mappings keep it alive until they close too."""
        self._handle = None
        self._buffer = None


def prove_peer_access(workspace: _C.Workspace, control_group: dist.ProcessGroup, device: torch.device) -> None:
    """Write real bytes to every peer and read them back from there. Collective.

    Raises:
        TransportError: on every rank alike, naming the pair whose bytes were lost.
    """
    rank, world_size = dist.get_rank(control_group), dist.get_world_size(control_group)
    nonces = [int.from_bytes(os.urandom(4), "little")]
    dist.broadcast_object_list(nonces, src=dist.get_global_rank(control_group, 0), group=control_group)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device)
        verdict = torch.zeros(world_size, dtype=torch.int32, device=device)
        workspace.probe_write(nonces[0], stream.cuda_stream)
        stream.synchronize()
        dist.barrier(group=control_group)
        workspace.probe_check(nonces[0], verdict.data_ptr(), stream.cuda_stream)
        seen = verdict.tolist()
    faults = []
    for peer, bits in enumerate(seen):
        if not bits & 1:
            faults.append(f"what rank {peer} wrote to rank {rank}'s memory did not arrive")
        elif not bits & 2:
            faults.append(f"rank {rank} reads something else from rank {peer}'s memory than it wrote there")
    if (lost := first_fault(faults[0] if faults else None, control_group)) is not None:
        message = f"shared memory is broken: {lost} (peer access that ACS or an IOMMU between the GPUs drops?)"
        raise TransportError(message)
