"""Real ranks as processes: a pool that is started once per world size and runs functions on every rank."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llm_allreduce_plugin.communicator import TensorParallelCommunicator
from llm_allreduce_plugin.config import AllReduceConfig

START_LIMIT_S = 240.0


@dataclasses.dataclass
class RankContext:
    """What a function running on a rank is given first."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup
    control_group: dist.ProcessGroup

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


def _serve(rank: int, world_size: int, device_type: str, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl", init_method=f"file://{store}", rank=rank, world_size=world_size, device_id=device
        )
        control = dist.new_group(backend="gloo")
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        control = dist.group.WORLD
    assert dist.group.WORLD is not None
    context = RankContext(rank, world_size, device, dist.group.WORLD, control)
    pipe.send(("ready", None))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if job is None:
            dist.destroy_process_group()
            return
        function, arguments = job
        try:
            pipe.send(("ok", function(context, *arguments)))
        except BaseException:  # noqa: BLE001  (reported to the caller)
            pipe.send(("error", traceback.format_exc()))


class RankPool:
    """``world_size`` processes in one group. ``run`` calls a module-level function on all of them."""

    def __init__(self, world_size: int, device_type: str) -> None:
        self.world_size = world_size
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = str(Path(self._folder.name) / "store")
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, device_type, store, theirs), daemon=True, name=f"rank-{rank}"
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        self._collect(START_LIMIT_S, range(world_size))

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,  # noqa: ANN401
        timeout_s: float = 300.0,
        ranks: list[int] | None = None,
    ) -> list[Any]:
        """``function(context, *arguments)`` on ``ranks`` (default: all); their results.

        Raises:
            AssertionError: with every failed rank's traceback.
            TimeoutError: a rank did not answer.
        """
        members = list(range(self.world_size)) if ranks is None else ranks
        for rank in members:
            self._pipes[rank].send((function, arguments))
        return self._collect(timeout_s, members)

    def _collect(self, timeout_s: float, ranks: Iterable[int]) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        results, errors = [], []
        for rank in ranks:
            if not self._pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                self.kill()
                message = f"rank {rank} gave no answer within {timeout_s} s"
                raise TimeoutError(message)
            try:
                kind, value = self._pipes[rank].recv()
            except EOFError:
                errors.append(f"rank {rank} died")
                continue
            if kind == "error":
                errors.append(f"rank {rank}:\n{value}")
            results.append(value)
        if errors:
            raise AssertionError("\n".join(errors))
        return results

    def kill(self) -> None:
        """End every rank at once."""
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        """Let the ranks end, and wait for them."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
