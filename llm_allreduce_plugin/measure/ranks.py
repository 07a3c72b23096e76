"""Real ranks as processes: a pool that is started once per world size and runs functions on every rank."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist

from llm_allreduce_plugin.base import processes
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.errors import AllReduceError
from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator

START_LIMIT_S = 240.0
CLOSE_LIMIT_S = 20.0  # for ranks to end by themselves
END_LIMIT_S = 5.0  # for the kernel to end them
LOOPBACK = "127.0.0.1"


@dataclasses.dataclass
class RankContext:
    """What a function running on a rank is given first. ``parts``: of groups of the first ranks, which end with it."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup
    control_group: dist.ProcessGroup
    parts: list[RankContext] = dataclasses.field(default_factory=list)

    def shared_seed(self) -> int:
        """A fresh seed, the same on every rank."""
        seeds = [int.from_bytes(os.urandom(4), "little")]
        dist.broadcast_object_list(seeds, src=0, group=self.control_group)
        return seeds[0]

    def communicator(self, strategy: str, **settings: Any) -> TensorParallelCommunicator:  # noqa: ANN401
        """A communicator of this group. Collective."""
        config = AllReduceConfig(allreduce_strategy=strategy, **settings)
        return TensorParallelCommunicator(self.group, self.device, config, control_group=self.control_group)

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401
        """``value`` of every rank, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def leave(self) -> None:
        """End every process group of this rank, and the threads that serve them. No part of it has a group any more.

        A thread of gloo holds the tensors of a call for a moment after the call has returned, and needs the interpreter
        to let go of them. Where the interpreter ends in this moment, so does the process, by SIGABRT ("terminate called
        without an active exception"). Such threads are joined only when nobody has the group any more.
        """
        dist.destroy_process_group()
        for context in (self, *self.parts):
            del context.group, context.control_group
        self.parts.clear()
        gc.collect()  # what has been closed may hold a group, in a circle


def context_of(rank: int, world_size: int, device: torch.device, patience: dt.timedelta | None = None) -> RankContext:
    """Of a rank of torch's default group, with a control group where ranks are on GPUs. Collective.

    ``patience``: of calls in the control group; None: torch's own.
    """
    whole = dist.group.WORLD
    assert whole is not None
    control = dist.new_group(backend="gloo", timeout=patience) if device.type == "cuda" else whole
    return RankContext(rank, world_size, device, whole, control)


def serve(
    rank: int,
    world_size: int,
    device_name: str,
    port: int,
    pipe: Connection,
    nccl_at_once: bool = True,  # noqa: FBT001, FBT002  (a process is given arguments in order)
) -> None:
    """What a rank does: join the group at this port, then run what comes through the pipe, until there is no more.

    Args:
        rank: its number.
        world_size: how many there are.
        device_name: ``"cpu"``, ``"cuda:0"``, or ``"cuda"``, the GPU with the rank's number.
        port: of the store, on this machine.
        pipe: to whoever has started it.
        nccl_at_once: make NCCL's communicator now, and not at the first call that needs it.
    """
    torch.set_num_threads(1)
    patience = dt.timedelta(seconds=START_LIMIT_S)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK, port, is_master=False, timeout=patience
    )
    device = torch.device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", rank if device.index is None else device.index)
        torch.cuda.set_device(device)
        bound = device if nccl_at_once else None
        dist.init_process_group("nccl", store=store, rank=rank, world_size=world_size, device_id=bound)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    context = context_of(rank, world_size, device)
    pipe.send(("ready", None))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if job is None:
            context.leave()
            return
        function, arguments = job
        try:
            pipe.send(("ok", function(context, *arguments)))
        except BaseException:  # noqa: BLE001  (reported to the caller)
            pipe.send(("error", traceback.format_exc()))


class RankFailedError(AssertionError):
    """Functions on ranks raised something. The text has every such rank's traceback.

    Attributes:
        summary: the first of these ranks and what it raised, in a line.
    """

    def __init__(self, tracebacks: dict[int, str]) -> None:
        rank, text = next(iter(tracebacks.items()))
        self.summary = f"rank {rank}: {text.strip().splitlines()[-1]}"
        super().__init__("\n".join(f"rank {rank}:\n{text}" for rank, text in tracebacks.items()))


class RankEndedError(AllReduceError, RuntimeError):
    """A rank's process has ended. The text names the rank and how it ended; the other ranks were ended too."""


# What RankPool raises, and what a function on a rank may.
FAILURES = (RankFailedError, RankEndedError, TimeoutError)


def in_a_line(error: BaseException) -> str:
    """One of :data:`FAILURES` for people who have no use for tracebacks."""
    return error.summary if isinstance(error, RankFailedError) else " ".join(str(error).split())


def _meeting_place(listener: socket.socket) -> Any:  # noqa: ANN401  (torch's stubs have no TCPStore)
    """A store for ranks of this machine: in this process's memory, so that nothing of it is left however this ends.

    By itself it would listen to every network that the machine is in.
    """
    port = listener.getsockname()[1]
    return dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


class Ranks(Protocol):
    """What measures on ranks takes: functions run on all of them, or on the first ones."""

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,  # noqa: ANN401
        timeout_s: float = ...,
        ranks: list[int] | None = ...,
    ) -> list[Any]:
        """See :class:`RankPool`."""


class RankPool:
    """``world_size`` processes in one group. ``run`` calls a module-level function on all of them.

    Ranks end with the process that made the pool, however that ends: more exactly with the thread, so a pool is made
    in one that lasts. As a context manager it ends them at once when its block raises.

    Args:
        world_size: number of ranks.
        device_type: ``"cuda"``, a GPU each, or ``"cpu"``.
        forked: they have what this process has loaded, and need not load torch again. It must have no threads, and must
            not have used CUDA.
        nccl_at_once: ranks on GPUs make NCCL's communicator at their start, and not when something first needs it.

    Raises:
        RankEndedError: a rank's process ended before it was ready.
        RankFailedError: a rank could not start.
        TimeoutError: a rank was not ready within ``START_LIMIT_S``.
    """

    def __init__(self, world_size: int, device_type: str, *, forked: bool = False, nccl_at_once: bool = True) -> None:
        self._method = "fork" if forked else "spawn"
        self._nccl_at_once = nccl_at_once
        self.world_size = world_size
        self.device_type = device_type
        self._store: Any = None
        self._pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self._forget = processes.at_last(self.kill)
        listener = socket.create_server((LOOPBACK, 0))
        try:
            for rank in range(world_size):
                ours, theirs = multiprocessing.Pipe()
                process = self._process(rank, listener.getsockname()[1], theirs)
                with processes.interrupts_held():
                    process.start()
                    self.processes.append(process)
                theirs.close()
                self._pipes.append(ours)
            # Behind them, for it has threads, which a process that is forked must not have. Who comes first waits.
            self._store = _meeting_place(listener)
            self._collect(START_LIMIT_S, range(world_size))
        except BaseException:
            listener.close()
            self._end()
            raise

    def _process(self, rank: int, port: int, pipe: Connection) -> BaseProcess:
        """A rank's process, not yet started."""
        serves = rank, self.world_size, self.device_type, port, pipe, self._nccl_at_once
        arguments = (os.getpid(), __name__, serve.__name__, *serves)
        context = multiprocessing.get_context(self._method)
        made: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=processes.run_child, args=arguments, daemon=True, name=f"rank-{rank}"
        )
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._end()

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,  # noqa: ANN401
        timeout_s: float = 300.0,
        ranks: list[int] | None = None,
    ) -> list[Any]:
        """``function(context, *arguments)`` on ``ranks`` (default: all); their results.

        Raises:
            RankFailedError: an AssertionError, with every failed rank's traceback.
            RankEndedError: a rank's process ended; so have the others, then.
            TimeoutError: a rank did not answer.
        """
        members = list(range(self.world_size)) if ranks is None else ranks
        for rank in members:
            # One that has ended is named below.
            with contextlib.suppress(OSError):
                self._pipes[rank].send((function, arguments))
        return self._collect(timeout_s, members)

    def _collect(self, timeout_s: float, ranks: Iterable[int]) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        waited_for = list(ranks)
        results: dict[int, Any] = {}
        tracebacks: dict[int, str] = {}
        while missing := [rank for rank in waited_for if rank not in results]:
            watched: list[Connection | int] = [self._pipes[rank] for rank in missing]
            watched += [self.processes[rank].sentinel for rank in missing]
            if not connection.wait(watched, max(0.0, deadline - time.monotonic())):
                self.kill()
                if tracebacks:  # which is why the others wait
                    break
                names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
                message = f"{names} gave no answer within {timeout_s:g} s"
                raise TimeoutError(message)
            for rank in missing:
                answer = self._answer_of(rank)
                if answer is None:
                    continue
                kind, value = results[rank] = answer
                if kind == "error":
                    tracebacks[rank] = value
        if tracebacks:
            raise RankFailedError(dict(sorted(tracebacks.items())))
        return [results[rank][1] for rank in waited_for]

    def _answer_of(self, rank: int) -> tuple[str, Any] | None:
        """What a rank has answered; None when it has not yet.

        Raises:
            RankEndedError: it never will.
        """
        pipe, process = self._pipes[rank], self.processes[rank]
        ended = not process.is_alive()  # asked first: what it said before its end is in the pipe then
        try:
            if pipe.poll():
                answer: tuple[str, Any] = pipe.recv()
                return answer
        except (EOFError, OSError):  # nothing, or half an answer
            process.join(END_LIMIT_S)
            ended = True
        if not ended:
            return None
        self._end()
        message = f"rank {rank} {processes.how_it_ended(process.exitcode)}"
        raise RankEndedError(message)

    def kill(self) -> None:
        """End every rank at once."""
        for process in self.processes:
            process.kill()
        self._forget()

    def _end(self) -> None:
        """End every rank at once, and wait until they have."""
        self.kill()
        deadline = time.monotonic() + END_LIMIT_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._store = None  # stops listening

    def close(self) -> None:
        """Let the ranks end, and wait for them."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        deadline = time.monotonic() + CLOSE_LIMIT_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._end()
