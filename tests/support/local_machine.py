"""What the ranks of a local group run on: one GPU for all of them, two by turns, or an emulated GPU for each."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Protocol
from unittest import mock

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Launch
from llm_allreduce_plugin.runtime import calls
from tests.support import emulator


class Stream(Protocol):
    """As torch has it."""

    @property
    def cuda_stream(self) -> int: ...


class LocalMachine(Protocol):
    """``native``: the bindings of the library that runs there. ``device``: where torch keeps what kernels touch, of
    the first rank; :meth:`device_of` says so of each."""

    native: types.ModuleType
    device: torch.device

    def index(self, rank: int) -> int:
        """The GPU of a rank."""
        ...

    def device_of(self, rank: int) -> torch.device:
        """Where torch keeps what is a rank's own."""
        ...

    def load_kernels(self, world_size: int) -> None:
        """Before any runs: on a GPU where others wait for it, a kernel that is loaded later would wait for them."""
        ...

    def use_host_memory(self, memory: torch.Tensor) -> None:
        """Before any kernel runs: that this is pinned host memory, which all ranks share."""
        ...

    def stream(self, rank: int) -> Stream:
        """A stream of its own."""
        ...

    def synchronize(self) -> None:
        """Until all streams have done all that they were given."""
        ...


class OneGpu:
    """The current one. Grids must be small, so that all ranks' kernels are resident together."""

    native: types.ModuleType = _C

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def index(self, rank: int) -> int:
        return self.device_of(rank).index

    def device_of(self, rank: int) -> torch.device:
        return self.device

    def load_kernels(self, world_size: int) -> None:
        self.native.load_kernels(world_size)

    def use_host_memory(self, memory: torch.Tensor) -> None:
        pass

    def stream(self, rank: int) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device_of(rank))

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def peer_obstacle() -> str | None:
    """Why the first two GPUs cannot access each other's memory, or None when they can."""
    if (found := torch.cuda.device_count()) < 2:
        return f"needs 2 GPUs, {found} here"
    if not all(torch.cuda.can_device_access_peer(gpu, 1 - gpu) for gpu in range(2)):
        return "GPUs 0 and 1 cannot access each other's memory"
    return None


class TwoGpus(OneGpu):
    """The first two: even ranks on one, odd ranks on the other. They must be able to access each other's memory.

    Raises:
        RuntimeError: they cannot.
    """

    def __init__(self) -> None:
        if (reason := peer_obstacle()) is not None:
            raise RuntimeError(reason)
        self._devices = [torch.device("cuda", gpu) for gpu in range(2)]
        self.device = self._devices[0]
        # Torch lets a GPU access another's memory once it is to copy something from the one to the other.
        for here, there in (self._devices, reversed(self._devices)):
            torch.ones(1, device=here).to(there)
        self.synchronize()

    def device_of(self, rank: int) -> torch.device:
        return self._devices[rank % 2]

    def load_kernels(self, world_size: int) -> None:
        for device in self._devices:
            with torch.cuda.device(device):
                self.native.load_kernels(world_size)

    def synchronize(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)


class EmulatedGpus:
    """An emulated GPU for each rank. ``seed``: of who runs when. ``blocks``: that a GPU has room for."""

    device = torch.device("cpu")

    def __init__(self, seed: int, *, blocks: int | None = None, library: emulator.Library | None = None) -> None:
        self.library = library or emulator.library()
        self.native = self.library.native
        self.library.reset(seed)
        self._blocks = blocks

    def index(self, rank: int) -> int:
        return rank

    def device_of(self, rank: int) -> torch.device:
        return self.device

    def load_kernels(self, world_size: int) -> None:
        self.native.load_kernels(world_size)

    def use_host_memory(self, memory: torch.Tensor) -> None:
        self.library.add_host_memory(memory.data_ptr(), memory.nbytes)

    def stream(self, rank: int) -> emulator.Stream:
        if self._blocks is not None:
            self.library.limit(rank, blocks=self._blocks)
        return self.library.stream(rank)

    def synchronize(self) -> None:
        self.library.run()


def plan_on(
    machine: LocalMachine,
    workspace: _C.Workspace,
    launch: Launch,
    count: int,
    dtype: torch.dtype,
    peer_distances: Sequence[int] = (),
    pools: Sequence[int] = (),
) -> _C.Plan:
    """As calls.plan_of() makes it, with the bindings of this machine."""
    with mock.patch.object(calls, "_C", machine.native):
        return calls.plan_of(workspace, launch, count, dtype, peer_distances, pools=pools)
