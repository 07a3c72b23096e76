"""What a workspace begins as, the proof that ranks reach each other's; and GPU memory mapped by torch.

torch's symmetric memory is for ranks that cannot send each other files (transport/peer.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import PrefixStore, Store, _SymmetricMemory

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.topology.links import Transport

_MULTICAST_SWITCH = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


@contextlib.contextmanager
def without_multicast() -> Iterator[None]:
    """Torch creates a multicast object for every rendezvous unless told not to; no kernel here uses it.

    What goes by multicast has an object of its own (transport/multicast.py). So torch makes none, whatever
    NCCL_NVLS_ENABLE and TORCH_SYMM_MEM_DISABLE_MULTICAST say.
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


def _allocate(size: int, device: torch.device) -> torch.Tensor:
    with torch.cuda.device(device):
        return symm_mem.empty(size, dtype=torch.uint8, device=device)


def whole_group(buffer: torch.Tensor, group: dist.ProcessGroup) -> tuple[object, list[int]]:
    """The rendezvous of all ranks of a process group."""
    with without_multicast(), torch.cuda.device(buffer.device):
        handle = symm_mem.rendezvous(buffer, group)
        return handle, [int(base) for base in handle.buffer_ptrs]


Rendezvous = Callable[[torch.Tensor, dist.ProcessGroup], tuple[object, list[int]]]


def among(store: Store, rank: int, size: int, name: str) -> Rendezvous:
    """A rendezvous of some ranks of a group, such as those of one host, of which there is no process group.

    torch asks for a process group by its name, and of that for rank, size and store. One without a backend is all it
    needs. ``dist.new_group`` would give one to a part of the ranks only where nothing is split from the default group:
    where that is bound to a device (``init_process_group(device_id=...)``), NCCL splits it, for which *all* of its
    ranks must come, those of other pipeline stages too.

    Args:
        store: of a group that all of these ranks are in.
        rank: among them.
        size: their number.
        name: unlike that of any other such group, the same on each of them.
    """

    def rendezvous(buffer: torch.Tensor, _group: dist.ProcessGroup) -> tuple[object, list[int]]:
        own = PrefixStore(name, store)
        members = dist.ProcessGroup(own, rank, size)
        c10d._register_process_group(name, members)  # type: ignore  # noqa: PGH003, SLF001
        try:
            with without_multicast(), torch.cuda.device(buffer.device):
                try:
                    handle = _SymmetricMemory.rendezvous(buffer, name)
                except RuntimeError as error:
                    if "no group info" not in str(error):
                        raise
                    # torch that keeps a table of its own, as it says before it asks any peer.
                    _SymmetricMemory.set_group_info(name, rank, size, own)
                    handle = _SymmetricMemory.rendezvous(buffer, name)
                return handle, [int(base) for base in handle.buffer_ptrs]
        finally:
            c10d._unregister_process_group(name)  # type: ignore  # noqa: PGH003, SLF001

    return rendezvous


def share(
    agreement: Agreement,
    group: dist.ProcessGroup,
    device: torch.device,
    size: int,
    prepare: Callable[[torch.Tensor], None] = lambda _: None,
    *,
    allocate: Callable[[int, torch.device], torch.Tensor] = _allocate,
    rendezvous: Rendezvous = whole_group,
) -> tuple[torch.Tensor, object, list[int]]:
    """``size`` bytes on every rank, mapped into every rank; prepared before any peer can see them. Collective.

    A rendezvous waits for every rank, so none enters it before all have their memory.

    Args:
        agreement: of the ranks of ``group``.
        group: on which torch maps memory.
        device: this rank's.
        size: bytes of each rank.
        prepare: writes what must be there before the first peer looks.
        allocate: makes memory that can be mapped.
        rendezvous: maps it; what keeps the mapping alive, and the address of each rank's memory. Not asked where there
            is one rank, as on hosts with one GPU each.

    Returns:
        This rank's bytes, what keeps the mapping alive, and the address at which this rank sees each rank's.

    Raises:
        TransportError: on every rank alike, when a rank cannot allocate or map.
    """

    def make() -> torch.Tensor:
        buffer = allocate(size, device)
        prepare(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return buffer

    cannot = f"cannot allocate {size} bytes for peers to see"
    buffer = agreement.on_every_rank(make, "to allocate memory", TransportError, cannot, may_block=True)
    handle, bases = agreement.on_every_rank(
        lambda: rendezvous(buffer, group) if agreement.world_size > 1 else (None, [buffer.data_ptr()]),
        "to map each other's memory",
        TransportError,
        "cannot map its peers' memory",
        may_block=True,
    )
    return buffer, handle, bases


class SymmetricMemory:
    """A workspace of the given layout on every rank, initialized, mapped into every rank.

    torch allocates it with the driver's virtual memory calls, outside the caching allocator and outside any pool that
    an engine frees (sleep mode) or that expandable segments would make unshareable.

    Attributes:
        own: this rank's bytes; None once it is closed.
    """

    transport = Transport.SYMMETRIC
    local = 0

    def __init__(self, buffer: torch.Tensor, handle: object, bases: list[int]) -> None:
        self.own: torch.Tensor | None = buffer
        self._handle: object | None = handle
        self.bases = bases

    @classmethod
    def open(
        cls,
        agreement: Agreement,
        group: dist.ProcessGroup,
        device: torch.device,
        layout: _C.Layout,
        rendezvous: Rendezvous = whole_group,
    ) -> SymmetricMemory:
        """Collective; ``agreement`` is of the ranks of ``group``, on which torch maps memory, or ``rendezvous`` does.

        Raises:
            TransportError: on every rank alike, when a rank cannot allocate or map.
        """

        def prepare(buffer: torch.Tensor) -> None:
            initialize(buffer, layout)

        return cls(*share(agreement, group, device, layout.total_bytes, prepare, rendezvous=rendezvous))

    def close(self) -> None:
        """Let go of this rank's memory; peers' mappings keep it alive until they close too."""
        self._handle = None
        self.own = None


def prove_peer_access(workspace: _C.Workspace, agreement: Agreement, device: torch.device) -> None:
    """Write real bytes to every peer and read them back from there. Collective.

    Raises:
        TransportError: on every rank alike, naming the pair whose bytes were lost.
    """
    rank, world_size = agreement.rank, agreement.world_size
    nonce = agreement.from_first_rank(
        lambda: int.from_bytes(os.urandom(4), "little"), "to draw a number", TransportError
    )

    def write() -> torch.Tensor:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            verdict = torch.zeros(world_size, dtype=torch.int32, device=device)
            workspace.probe_write(nonce, stream.cuda_stream)
            stream.synchronize()
            return verdict

    def check() -> list[int]:
        with torch.cuda.device(device):
            workspace.probe_check(nonce, verdict.data_ptr(), torch.cuda.current_stream(device).cuda_stream)
            return [int(bits) for bits in verdict.tolist()]

    # A broken link may hold a GPU for ever.
    step, failed = "to prove that memory is shared", "cannot reach shared memory"
    verdict = agreement.on_every_rank(write, step, TransportError, failed, may_block=True)
    seen = agreement.on_every_rank(check, step, TransportError, failed, may_block=True)
    faults = []
    for peer, bits in enumerate(seen):
        if not bits & 1:
            faults.append(f"what rank {peer} wrote to rank {rank}'s memory did not arrive")
        elif not bits & 2:
            faults.append(f"rank {rank} reads something else from rank {peer}'s memory than it wrote there")
    if (lost := agreement.first_fault(faults[0] if faults else None, step)) is not None:
        message = f"shared memory is broken: {lost} (peer access that ACS or an IOMMU between the GPUs drops?)"
        raise TransportError(message)
