"""The start of a group: ranks agree, share memory and prove it, and only then make a workspace of it.

Every step is taken by all ranks, under a deadline, and what only one rank meets stops all of them alike.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.user_buffer import largest_output, pool_bytes
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.base.cleanup import let_go, quietly
from llm_allreduce_plugin.base.step import store_of
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.errors import ConfigError, TransportError
from llm_allreduce_plugin.group import cards
from llm_allreduce_plugin.group.board import ROW_BYTES, Board
from llm_allreduce_plugin.group.cards import RankCard
from llm_allreduce_plugin.group.facts import gpus_of, reach_of
from llm_allreduce_plugin.group.host_agreement import HostAgreement
from llm_allreduce_plugin.group.kernel_load import KernelLoad, prove_norm
from llm_allreduce_plugin.group.layouts import refusal_note
from llm_allreduce_plugin.group.multicast_start import open_multicast
from llm_allreduce_plugin.group.places import Places
from llm_allreduce_plugin.group.start_log import StartTimes
from llm_allreduce_plugin.profiles.search import with_profile
from llm_allreduce_plugin.topology.identity import NodeIdentity
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.topology.model import NodeTopology
from llm_allreduce_plugin.transport import SharedMemory, symmetric
from llm_allreduce_plugin.transport.fabric import FabricMemory
from llm_allreduce_plugin.transport.fabric_probe import domain_fault
from llm_allreduce_plugin.transport.host import HostMemory
from llm_allreduce_plugin.transport.multicast import MulticastMemory
from llm_allreduce_plugin.transport.peer import is_by_files, open_peer_memory
from llm_allreduce_plugin.transport.rail import Rail
from llm_allreduce_plugin.transport.registered import RegisteredPool
from llm_allreduce_plugin.transport.shm import ShmMemory
from llm_allreduce_plugin.transport.symmetric import prove_peer_access

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Opened:
    """What came of the start.

    Attributes:
        facts: what ranks have agreed on.
        memory: the ranks' workspaces; None: they share none.
        workspace: this rank's view of them.
        board: what ranks say of themselves; None: they share none.
        board_memory: where that lies.
        first_member: names the group, see :class:`RankCard`.
        places: of this rank; None: all ranks run on one host.
        rail: what joins it to other hosts; None: nothing need.
        multicast: memory of which one store reaches every rank; None: there is none.
        pool: registered memory; None: there is none.
        times: where the time of the start went.
    """

    facts: GroupFacts
    memory: SharedMemory | None = None
    workspace: _C.Workspace | None = None
    board: Board | None = None
    board_memory: ShmMemory | None = None
    first_member: str = ""
    places: Places | None = None
    rail: Rail | None = None
    multicast: MulticastMemory | None = None
    pool: RegisteredPool | None = None
    times: StartTimes = dataclasses.field(default_factory=StartTimes)

    def close(self, *, in_use: bool = False) -> None:
        """Let go of it, before any call was made. ``in_use``: a GPU may still use it, which then stays."""
        if in_use and self.memory is not None:
            let_go(self.memory, self.workspace, self.pool, in_use=True)
            self.memory = self.pool = None
        if self.workspace is not None:
            quietly(functools.partial(self.workspace.close, 0.0), "close the workspace")
        if self.multicast is not None:
            quietly(self.multicast.close, "let go of multicast memory")
        for held, what in ((self.board, "board"), (self.board_memory, "board"), (self.pool, "pool"),
                           (self.memory, "workspace")):  # fmt: skip
            if held is not None:
                quietly(held.close, f"let go of the {what}'s memory")
        if self.rail is not None:
            quietly(self.rail.abort, "let go of the connection between hosts")
        self.memory = self.workspace = self.board = self.board_memory = self.rail = self.pool = None
        self.multicast = None


def open_group(agreement: Agreement, group: dist.ProcessGroup, device: torch.device, config: AllReduceConfig) -> Opened:
    """Agree with all ranks of ``group`` on what to run and on what memory. Collective.

    Raises:
        ConfigError: a setting is wrong.
        RankMismatchError: ranks disagree about a setting or a capability.
        StartError, StartTimeoutError: a rank has failed or did not come.
    """
    times = StartTimes()
    # NVML is asked here and nowhere else: what it says goes with the card.
    node = NodeTopology.detect() if device.type == "cuda" else NodeTopology()
    card = RankCard.of_this_rank(config, device, node)
    times.ended("what is here")
    found: list[RankCard] = agreement.gather(card, "to compare settings")
    cards.check(found)
    config.check_world_size(agreement.world_size)
    times.ended("settings of all ranks")
    return _Start(agreement, group, device, config, found, times).open()


class _Start:
    def __init__(
        self,
        agreement: Agreement,
        group: dist.ProcessGroup,
        device: torch.device,
        config: AllReduceConfig,
        found: list[RankCard],
        times: StartTimes,
    ) -> None:
        self._agreement = agreement
        self._group = group
        self._device = device
        self._config = config
        self._cards = found
        self._times = times
        self._kernels = KernelLoad(device)
        self._over_fabric = False  # the memory that is opened is of an NVLink domain over several hosts
        self._places: Places | None = None  # of ranks that run on several hosts
        self._make_workspace: Callable[..., _C.Workspace] | None = None  # on the memory that was opened last

    def open(self) -> Opened:
        opened = self._open_workspace()
        opened.first_member = self._cards[0].member
        opened.times = times = self._times
        try:
            opened.facts = self._with_table(opened.facts)
            times.ended("tuning profile")
            if opened.facts.transport is Transport.NONE:
                opened.facts = self._with_norm(opened.facts)
                times.ended("norm")
            if opened.workspace is not None:
                self._open_board(opened)
                times.ended("board")
                self._open_pool(opened)
                times.ended("registered memory")
                opened.multicast, opened.facts = open_multicast(
                    self._agreement, self._device, self._config, opened.facts, opened.workspace, self._another_workspace
                )
                times.ended("multicast")
        except BaseException:
            opened.close(in_use=self._agreement.abandoned)
            raise
        return opened

    def _open_workspace(self) -> Opened:
        """Set up shared memory if the strategy can use it; the facts say what came of it."""
        agreement, config, topology = self._agreement, self._config, gpus_of(self._cards)
        failed: dict[Transport, str] = {}
        no_domain: str | None = None
        reach = reach_of(topology, self._cards, config)
        # All ranks have the same cards. Should one nevertheless come to another result, none may go on alone.
        obstacle = agreement.first_fault(
            reach.facts.no_transport_reason or None, "to agree on whether they can share memory"
        )
        if obstacle is not None:
            return Opened(dataclasses.replace(reach.facts, transport=Transport.NONE, no_transport_reason=obstacle))
        note = refusal_note(config.transport, cards.peer_refusal_of(self._cards))
        if agreement.rank == 0 and note is not None:
            logger.info("%s", note)
        if reach.facts.fabric and (no_domain := domain_fault(agreement, self._device)) is not None:
            topology = gpus_of(self._cards, no_domain)
            reach = reach_of(topology, self._cards, config, failed, no_domain)
        self._times.ended("links")
        while reach.layout is not None:
            transport = reach.facts.transport
            self._over_fabric = reach.facts.fabric
            self._places = Places.of(reach.facts.hosts, agreement.rank) if reach.facts.crosses_network else None
            try:
                memory, workspace = self._connect(transport, reach.layout)
                rail = self._open_rail(memory, workspace)
                self._times.ended("network")
            except TransportError as error:
                if reach.facts.fabric:
                    no_domain = str(error)
                    topology = gpus_of(self._cards, no_domain)
                else:
                    failed[transport] = str(error)
                reach = reach_of(topology, self._cards, config, failed, no_domain)
                continue
            if reach.passed_over and agreement.rank == 0:
                logger.warning("all-reduce goes through %s memory: %s", transport, "; ".join(reach.passed_over))
            return Opened(reach.facts, memory, workspace, places=self._places, rail=rail)
        return Opened(reach.facts)

    def _connect(self, transport: Transport, layout: _C.Layout) -> tuple[SharedMemory, _C.Workspace]:
        """Share memory of this layout, of each host, and prove that it is shared. Collective.

        Raises:
            TransportError: on every rank alike, with the reason.
        """
        agreement, group, device, config = self._agreement, self._group, self._device, self._config
        rendezvous: symmetric.Rendezvous = symmetric.whole_group
        if (places := self._places) is not None:
            agreement = HostAgreement(agreement, places)
            name = f"llm_allreduce/{self._cards[0].member}/host/{places.host}"
            rendezvous = symmetric.among(store_of(group), places.index, len(places.members), name)
        if transport is not Transport.SHM:
            self._kernels.begin(agreement.world_size)
        memory: SharedMemory
        if self._over_fabric:
            memory = FabricMemory.open(agreement, device, layout, transport)
        elif transport is Transport.SHM:
            memory = ShmMemory.open(agreement, layout.total_bytes)
        elif transport is Transport.HOST:
            memory = HostMemory.open(agreement, device, layout)
        else:
            memory = open_peer_memory(agreement, group, device, layout, rendezvous)
        self._times.ended("memory")

        made: list[_C.Workspace] = []

        def make() -> _C.Workspace:
            if transport is not Transport.SHM:
                self._kernels.end(agreement.world_size, agreement.wait_s)
            self._make_workspace = functools.partial(
                _C.Workspace, agreement.rank, memory.bases, layout,
                device=_C.CPU if transport is Transport.SHM else device.index, local=memory.local, owner=memory,
            )  # fmt: skip
            workspace = self._make_workspace(
                timeout_s=config.timeout_s, first_timeout_s=max(config.timeout_s, config.first_timeout_s)
            )
            made.append(workspace)
            return workspace

        try:
            workspace = agreement.on_every_rank(
                make, "to set up their workspaces", TransportError, "cannot set up its workspace", may_block=True
            )
            self._times.ended("kernels")
            if transport is not Transport.SHM:
                prove_peer_access(workspace, agreement, device)
            self._times.ended("proof of the links")
        except BaseException:
            let_go(memory, *made, in_use=agreement.abandoned)
            raise
        return memory, workspace

    def _another_workspace(self, timeout_s: float) -> _C.Workspace:
        """On the same memory, with waits of another length, a first call's included. For calls between others."""
        assert self._make_workspace is not None
        return self._make_workspace(timeout_s=timeout_s)

    def _open_rail(self, memory: SharedMemory, workspace: _C.Workspace) -> Rail | None:
        """Connect hosts; None: there is one. Collective.

        Raises:
            TransportError: on every rank alike, once it has let go of ``memory``.
        """
        places, agreement = self._places, self._agreement
        if places is None:
            return None
        try:
            return Rail.open(agreement, self._group, self._device, places.rail, self._cards[0].member)
        except BaseException:
            let_go(memory, workspace, in_use=agreement.abandoned)
            raise

    def _with_table(self, facts: GroupFacts) -> GroupFacts:
        """The facts with the profile that the first rank finds: ranks' caches may differ.

        Raises:
            ConfigError: on every rank alike, when ``tuning_profile`` names a file that cannot be used.
        """
        if facts.transport is Transport.NONE:
            return facts

        def look() -> GroupFacts:
            if self._device.type == "cuda":
                # Where NVML is missing, what CUDA calls one of the GPUs is all that is known.
                node = NodeIdentity.of_gpus(self._cards[0].node, torch.cuda.get_device_name(self._device))
            else:
                node = NodeIdentity.of_cpu()
            found, ignored = with_profile(self._config, facts, node)
            for line in ignored:
                logger.warning("%s", line)
            return found

        return self._agreement.from_first_rank(look, "to choose a tuning profile", ConfigError)

    def _with_norm(self, facts: GroupFacts) -> GroupFacts:
        """The facts with why this package norms nothing behind the engine's own all-reduce, if it cannot.

        The driver may be too old for the library, or the GPU: then no kernel loads, that of the norm neither.
        """
        device = self._device
        if device.type not in ("cpu", "cuda"):
            return dataclasses.replace(facts, no_norm_reason=f"no kernels for device type {device.type}")
        try:
            self._agreement.on_every_rank(
                lambda: prove_norm(device), "to prove the kernel of the norm", TransportError, "cannot norm a row",
                may_block=device.type == "cuda",
            )  # fmt: skip
        except TransportError as error:
            return dataclasses.replace(facts, no_norm_reason=str(error))
        return facts

    def _open_board(self, opened: Opened) -> None:
        """Errors name more with it; without it, all works as well."""
        agreement = self._agreement if opened.places is None else HostAgreement(self._agreement, opened.places)
        try:
            opened.board_memory = ShmMemory.open(agreement, ROW_BYTES)
        except TransportError as error:
            if self._agreement.rank == 0:
                logger.info("errors cannot say whether a peer has ended or is only late: %s", error)
            return
        opened.board = Board(opened.board_memory.buffer, agreement.rank, agreement.world_size)

    def _open_pool(self, opened: Opened) -> None:
        """Registered memory, where it is wanted; without it, results travel through slots."""
        facts = opened.facts
        if (size := pool_bytes(self._config, facts)) == 0:
            return
        try:
            opened.pool = RegisteredPool.open(
                self._agreement, self._group, self._device, facts.transport, size, largest_output(size),
                by_files=is_by_files(opened.memory),
            )  # fmt: skip
        except TransportError as error:
            opened.facts = dataclasses.replace(facts, no_pool_reason=f"registered memory cannot be opened: {error}")
            if self._agreement.rank == 0:
                logger.warning("%s", opened.facts.no_pool_reason)
