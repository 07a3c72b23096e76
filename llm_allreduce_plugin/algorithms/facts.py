"""What is, of that which a decision may depend on: the same on every rank, agreed at the start.

What is wanted, the settings, is no part of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_allreduce_plugin.topology.links import TopologyClass, Transport

if TYPE_CHECKING:
    from llm_allreduce_plugin import _C
    from llm_allreduce_plugin.algorithms.ranges import Tuned

PAIR = 2  # ranks of the smallest group
LARGEST_WORLD_SIZE = 72  # LAR_MAX_WORLD_SIZE: an NVLink domain
SUPPORTED_WORLD_SIZES = range(2, LARGEST_WORLD_SIZE + 1)
# The kernels' element types, as torch spells them, and their sizes in bytes.
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}  # lar_dtype


def world_size_obstacle(world_size: int) -> str | None:
    """Why no kernel serves this many ranks, or None."""
    if world_size in SUPPORTED_WORLD_SIZES:
        return None
    return f"no kernel for {world_size} rank{'s' * (world_size != 1)} (there are for 2 to {LARGEST_WORLD_SIZE})"


def hosts_obstacle(hosts: Sequence[int]) -> str | None:
    """Why ranks on these hosts, that of each rank, have no kernels together, or None: each needs as many ranks."""
    ranks = Counter(hosts)
    if len(set(ranks.values())) <= 1:
        return None
    each = ", ".join(f"{number} on host {host}" for host, number in sorted(ranks.items()))
    return f"ranks run on {len(ranks)} hosts, which must have as many each: there are {each}"


@dataclasses.dataclass(frozen=True)
class SlotBytes:
    """How much one slot holds: per lane with flags, of all lanes together in band. 0: there are no such slots.

    ``staged``: flagged slots as staged calls see them, of all lanes together.
    """

    one_shot: int = 0
    two_shot: int = 0
    staged: int = 0


@dataclasses.dataclass(frozen=True)
class MulticastBytes:
    """How much multicast memory holds: a slot of ONESHOT; results, and inputs that the switch sums, of all ranks."""

    one_shot: int = 0
    results: int = 0
    inputs: int = 0


@dataclasses.dataclass(frozen=True)
class GroupFacts:
    """The agreed facts of a tensor-parallel group.

    Attributes:
        world_size: ranks in the group.
        device: ``"cuda"`` or ``"cpu"``.
        transport: how ranks reach each other; ``NONE`` when they cannot.
        no_transport_reason: why, when they cannot.
        lanes: blocks that a call may have.
        in_band: slots in which readiness travels inside the data.
        flagged: slots with flags that tell when they may be read.
        multicast: memory of which one store reaches every rank; all 0: there is none.
        no_multicast_reason: why, when there is none.
        architecture: compute capability without the dot (90 for H100/H200), None on CPU.
        gpu_name: what its GPUs are called, like ``"NVIDIA H200"``; empty where they differ, or nobody knows.
        multiprocessors: of the smallest GPU; None where it is not known, and on CPU.
        hosts: the host of each rank, numbered as ranks first name them: (0, 0, 1, 1) for two hosts of two.
        fabric: ranks on several hosts form one NVLink domain: they reach each other's GPU memory as on one host.
        no_fabric_reason: of ranks on several hosts, why they do not.
        nvlink: NVLink joins every pair of GPUs, or nobody knows. Only says something of GPUs.
        domains: the NUMA node of each rank's GPU; empty when it is not known of all.
        topology_class: what the bytes travel over, as far as the first rank knows.
        tuned: what was measured about this group on this node or one like it; None: seed tables decide.
        no_pool_reason: why registered memory could not be opened, where it was asked for.
        no_norm_reason: why no kernel norms what the engine's own all-reduce has summed; empty: one does.
    """

    world_size: int
    device: str
    transport: Transport
    no_transport_reason: str = ""
    lanes: int = 0
    in_band: SlotBytes = SlotBytes()
    flagged: SlotBytes = SlotBytes()
    multicast: MulticastBytes = MulticastBytes()
    no_multicast_reason: str = ""
    architecture: int | None = None
    gpu_name: str = ""
    multiprocessors: int | None = None
    hosts: tuple[int, ...] = ()
    fabric: bool = False
    no_fabric_reason: str = ""
    nvlink: bool = True
    domains: tuple[int, ...] = ()
    topology_class: TopologyClass = TopologyClass.UNKNOWN
    tuned: Tuned | None = None
    no_pool_reason: str = ""
    no_norm_reason: str = ""

    @property
    def num_hosts(self) -> int:
        """Hosts that ranks run on; 1 where that is not known."""
        return len(set(self.hosts)) or 1

    @property
    def crosses_network(self) -> bool:
        """Ranks run on several hosts that share no memory: sums are exchanged between them."""
        return self.num_hosts > 1 and not self.fabric

    @property
    def summed_hosts(self) -> int:
        """Hosts of which sums are exchanged; 1 where ranks reach each other's memory."""
        return self.num_hosts if self.crosses_network else 1

    @property
    def host_order(self) -> tuple[int, ...]:
        """The host of each rank, as exact sums are ordered by it: where memory is shared there is only one."""
        return self.hosts if self.crosses_network else (0,) * self.world_size

    @property
    def local_size(self) -> int:
        """Ranks that share memory: those of a host."""
        return self.world_size // self.num_hosts if self.crosses_network else self.world_size

    def without_multicast(self, reason: str = "") -> GroupFacts:
        """These facts where one store reaches one rank."""
        return dataclasses.replace(self, multicast=MulticastBytes(), no_multicast_reason=reason)

    def with_layout(self, transport: Transport, layout: _C.Layout) -> GroupFacts:
        """These facts once ranks reach each other through workspaces of this layout."""
        return dataclasses.replace(
            self,
            transport=transport,
            lanes=layout.lanes,
            in_band=SlotBytes(layout.in_band.one_shot_bytes, layout.in_band.two_shot_bytes),
            flagged=SlotBytes(
                layout.flagged.one_shot_bytes, layout.flagged.two_shot_bytes, layout.flagged.staged_bytes
            ),
        )
