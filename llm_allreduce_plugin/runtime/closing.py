"""The end of a communicator: in an order that suits a group in which something is wrong, and in bounded time."""

from __future__ import annotations

import logging

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.cleanup import Ending, keep_for_ever
from llm_allreduce_plugin.runtime.held import Held
from llm_allreduce_plugin.runtime.planner import Planner
from llm_allreduce_plugin.runtime.reports import RegisteredUse
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.mapped import let_go_of_dropped

logger = logging.getLogger(__name__)

_LEAVE_WAIT_S = 1.0  # for a call to leave its wait
_CONTEXT_ENDS_S = 10.0  # for the driver to end a context after a wait has expired; 5 s were seen
_HOSTS_WAIT_S = 8.0  # for the store to answer, and the network
_MONITOR_WAIT_S = 8.0  # for the last report, on whatever file system


def end(held: Held, planner: Planner, ending: Ending) -> None:
    """Take every step to the end, each in bounded time; ``ending`` has what went wrong. Nothing is held any more.

    No call begins any more; CPU ranks that wait in one leave it. What runs on the GPU is waited for. Then come the
    summary, the last report, and the end of the memory, unless something still runs on it.
    """
    health, tally = held.health, planner.tally
    is_quiet = _end_calls(held, ending)
    _leave_hosts(held, ending, is_quiet=is_quiet)
    is_broken = bool(ending.errors)
    broken = health.error() if health is not None and not _was_left(held.workspace) else None
    if broken is not None and health is not None:
        is_broken = True
        for error in ending.errors:  # what follows from the expired wait
            logger.debug("after the failure: %s", error)
        # Who has heard of it in a call need not hear of it again.
        ending.errors = [] if health.told else [broken]
        ending.step(health.look, "tell peers")
        health.told = True
    ending.step(tally.end, "count calls")
    if held.rank == 0:
        ending.step(lambda: logger.info("all-reduce summary: %s", tally.counts()), "log the summary")
    if held.rank == 0 and (pool := held.pool) is not None:
        ending.step(lambda: logger.info("%s", RegisteredUse(**pool.use())), "log what registered memory was used for")
    if held.monitor is not None:
        ending.step(held.monitor.close, "end the monitor", _MONITOR_WAIT_S)
    _free(held, planner, ending, is_quiet=is_quiet, is_broken=is_broken)
    held.forget()


def _leave_hosts(held: Held, ending: Ending, *, is_quiet: bool) -> None:
    """Tell other hosts, and let go of what joins them to this one."""
    between = held.between
    if between is None:
        return
    ending.step(between.watch.close, "leave other hosts", _HOSTS_WAIT_S)
    rail = between.rail
    ending.step(rail.close if is_quiet else rail.abort, "let go of the connection between hosts", _HOSTS_WAIT_S)


def _was_left(workspace: _C.Workspace | None) -> bool:
    """Whether all that is wrong is that closing has ended a call of another thread."""
    return workspace is not None and workspace.failure() is not None and workspace.reason() == _C.REASON_INTERRUPTED


def _end_calls(held: Held, ending: Ending) -> bool:
    """No call begins from now on; whether none is under way any more."""
    workspace, device = held.workspace, held.device
    if held.checker is not None:
        ending.step(held.checker.close, "end the comparison of calls")
    if workspace is None:
        return True
    left: list[bool] = []
    ending.step(lambda: left.append(workspace.close(_LEAVE_WAIT_S)), "stop taking calls")
    is_quiet = left == [True]
    if device.type == "cuda":
        # A context that an expired wait has ended, or that hangs, must not hold what follows.
        is_quiet &= ending.step(
            lambda: torch.cuda.synchronize(device),
            f"wait for {device}",
            held.timeout_s + _LEAVE_WAIT_S,
            lambda: 0.0 if workspace.failure() is None else _CONTEXT_ENDS_S,
        )
    return is_quiet


def _free(held: Held, planner: Planner, ending: Ending, *, is_quiet: bool, is_broken: bool) -> None:
    """The end of all memory."""
    buffers = planner.buffers
    planner.forget()
    kept = [held.memory, held.workspace, held.pool, held.multicast, *buffers]
    if not is_quiet:
        logger.warning("an all-reduce may still be running: its memory is kept until this process ends")
        keep_for_ever(*kept)
    elif is_broken and held.transport is Transport.SYMMETRIC:
        # What torch has mapped (transport/symmetric.py) it frees with calls that end the process where the context has
        # ended before; the driver refuses those of this package.
        logger.info("GPU memory of this group is freed when this process ends: its CUDA context has failed")
        keep_for_ever(*kept)
    elif held.memory is not None:
        buffers.clear()
        if held.multicast is not None:
            ending.step(held.multicast.close, "let go of multicast memory")
        ending.step(held.memory.close, "let go of the workspace's memory")
        if held.pool is not None:
            ending.step(held.pool.close, "let go of registered memory")
        ending.step(let_go_of_dropped, "let go of memory that was dropped", held.timeout_s + _LEAVE_WAIT_S)
    del kept
    if held.board is not None:
        ending.step(held.board.close, "leave the board")
    if held.board_memory is not None:
        ending.step(held.board_memory.close, "let go of the board's memory")
    buffers.clear()
