"""What the ranks of a local group run on: one GPU for all of them, or an emulated GPU for each."""

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
    """``native``: the bindings of the library that runs there. ``device``: where torch keeps what kernels touch."""

    native: types.ModuleType
    device: torch.device

    def index(self, rank: int) -> int:
        """The GPU of a rank."""
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
        return self.device.index

    def stream(self, rank: int) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


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
