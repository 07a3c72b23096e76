"""What a communicator holds from its start to its end: how it comes together, and who watches it meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.group.board import Board
from llm_allreduce_plugin.group.start import Opened, open_group
from llm_allreduce_plugin.runtime import metrics
from llm_allreduce_plugin.runtime.checked_calls import CallChecker
from llm_allreduce_plugin.runtime.health import Health
from llm_allreduce_plugin.runtime.monitor import Monitor
from llm_allreduce_plugin.runtime.network_calls import Between, join_hosts
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport import SharedMemory
from llm_allreduce_plugin.transport.multicast import MulticastMemory
from llm_allreduce_plugin.transport.registered import RegisteredPool
from llm_allreduce_plugin.transport.shm import ShmMemory


@dataclasses.dataclass
class Held:
    """What the start has opened, and the end (:mod:`~llm_allreduce_plugin.runtime.closing`) lets go of.

    None: there is none, or not any more.

    Attributes:
        rank: whose it is.
        device: this rank's.
        transport: by which ranks reach each other's memory.
        timeout_s: what the end waits for a device.
        memory: the ranks' workspaces.
        workspace: this rank's view of them.
        board: what ranks say of themselves.
        board_memory: where that lies.
        multicast: memory of which one store reaches every rank.
        pool: registered memory.
        between: what joins this rank to other hosts.
        health: what is known of the group; None where there is no workspace.
        checker: compares calls between ranks first.
        monitor: the threads beside the calls, see :meth:`watch`.
    """

    rank: int
    device: torch.device
    transport: Transport
    timeout_s: float
    memory: SharedMemory | None
    workspace: _C.Workspace | None
    board: Board | None
    board_memory: ShmMemory | None
    multicast: MulticastMemory | None
    pool: RegisteredPool | None
    between: Between | None
    health: Health | None
    checker: CallChecker | None
    monitor: Monitor | None = None

    def watch(
        self, config: AllReduceConfig, report: Callable[[], dict[str, Any] | None], alive: Callable[[], bool]
    ) -> None:
        """Start the threads beside the calls, unless there is nothing to watch or to report.

        Args:
            config: the settings.
            report: what the rank has done so far; None once its communicator is gone. Must not keep that alive.
            alive: False once the communicator is gone. Must not keep it alive either.
        """
        counters = metrics.RankCounters.if_wanted()
        if self.workspace is None and config.report_dir is None and counters is None:
            return
        watchers = () if self.health is None else (self.health.look,)
        self.monitor = Monitor(
            self.workspace,
            config.report_dir,
            report,
            counters,
            alive=alive,
            board=self.board,
            watchers=watchers if self.between is None else (*watchers, self.between.watch.look),
            error=None if self.health is None else self.health.error,
        )

    def forget(self) -> None:
        """Hold nothing that could keep memory alive."""
        self.memory = self.workspace = self.board = self.board_memory = self.health = self.monitor = self.between = (
            self.pool
        ) = self.multicast = None


def open_together(
    control_group: dist.ProcessGroup, group: dist.ProcessGroup, device: torch.device, config: AllReduceConfig
) -> Opened:
    """Agree with all ranks, and share memory. Collective.

    Raises:
        RankMismatchError: ranks disagree about a setting or a capability.
        StartTimeoutError: a rank did not come to a step of the start within ``start_timeout_s``.
        StartError: a rank has failed at the start, or the store of the control group is gone.
    """
    agreement = Agreement(control_group, config.start_timeout_s)
    try:
        return open_group(agreement, group, device, config)
    except BaseException as error:
        agreement.give_up(error)
        raise
    finally:
        agreement.close()


def hold(
    opened: Opened, control_group: dist.ProcessGroup, rank: int, device: torch.device, config: AllReduceConfig
) -> Held:
    """What was opened, with what is known of the group's health, and with other hosts joined and watched."""
    between = _joined(opened, control_group, config)
    checker = CallChecker(control_group, config.timeout_s, config.first_timeout_s) if config.check_calls else None
    return Held(
        rank, device, opened.facts.transport, config.timeout_s, opened.memory, opened.workspace, opened.board,
        opened.board_memory, opened.multicast, opened.pool, between, _health_of(opened, between), checker,
    )  # fmt: skip


def _joined(opened: Opened, control_group: dist.ProcessGroup, config: AllReduceConfig) -> Between | None:
    """What joins this rank to other hosts, watched."""
    if opened.rail is None or opened.places is None or opened.workspace is None:
        return None
    return join_hosts(control_group, opened.workspace, opened.board, opened.rail, opened.places,
                      opened.first_member, config)  # fmt: skip


def _health_of(opened: Opened, between: Between | None) -> Health | None:
    if opened.workspace is None:
        return None
    if between is None or opened.places is None:
        return Health(opened.workspace, opened.board)
    watch = between.watch
    return Health(opened.workspace, opened.board, opened.places.members, lambda: watch.error)
