"""Several ranks in one process, on one GPU or on emulated ones: world sizes beyond the GPUs at hand.

Each rank has its own workspace and stream; grids are small, so that all ranks' kernels are resident together.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from llm_allreduce_plugin import _C, AllReduceStrategy
from llm_allreduce_plugin.algorithms.base import Message
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange, Launch
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.algorithms.packets import packets_of, spread_packets
from llm_allreduce_plugin.algorithms.strategies import STRATEGIES
from llm_allreduce_plugin.config import (
    AllReduceConfig,
    LowPrecisionAlgorithm,
    LowPrecisionConfig,
    StagedChoice,
    WireFormat,
)
from llm_allreduce_plugin.group import layouts
from llm_allreduce_plugin.group.layouts import STAGED_IN_BAND_SHARE, host_layout
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.symmetric import initialize
from tests.support.in_band_rest import assert_at_rest, in_band_epochs
from tests.support.local_machine import LocalMachine, OneGpu, Stream, plan_on

GUARD_BYTES = 256
# What the driver may take to end a context after a wait has expired, in seconds: up to 5.4 have been seen.
CONTEXT_END_S = 8.0


def message_of(tensor: torch.Tensor) -> Message:
    """As the policy sees it."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Message(tensor.numel(), dtype, ELEMENT_BYTES[dtype])


# Streams beyond the hardware queues (8 by default) share one, and a kernel would wait behind the very one that waits
# for it.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def _distances(rank: int, inputs: Sequence[torch.Tensor]) -> list[int]:
    """From a rank's input to those of all."""
    return [other.data_ptr() - inputs[rank].data_ptr() for other in inputs]


class LocalGroup:
    """``world_size`` ranks on ``machine``, by default the current GPU; ``lanes`` bounds every rank's grid.

    A rank may have two kernels resident, one that runs and one that waits for it to end, and those of all ranks must
    fit onto the GPU together.

    ``host``: workspaces in pinned host memory, as ranks without peer access have. ``workspace_mib`` decides how many
    rounds a message takes. ``split``: lanes that only scatter and lanes that only drain, of 4 or more, as in messages
    larger than tests have. ``unsplit``: LOWPRECISION's packets travel in band as that algorithm, and every lane does
    everything. ``wire_format``, ``algorithm``, ``domains``: of LOWPRECISION; see :meth:`use`. ``staged``:
    TWOSHOT and LOWPRECISION move in stages; may be switched between calls where the workspace was made for it.
    ``threads``: of a block at most, where the strategy would have more.
    """

    def __init__(
        self,
        world_size: int,
        *,
        in_band: bool = True,
        host: bool = False,
        lanes: int = 4,
        workspace_mib: float = 64,
        split: tuple[int, int] | None = None,
        wire_format: WireFormat = WireFormat.FP8,
        staged: bool = False,
        algorithm: str = "two_shot",
        domains: Sequence[int] | None = None,
        timeout_s: float = 20.0,
        first_timeout_s: float = 0.0,
        threads: int | None = None,
        unsplit: Algorithm | None = None,
        machine: LocalMachine | None = None,
    ) -> None:
        self.machine = machine or OneGpu()
        self.device = self.machine.device
        native = self.machine.native
        self.threads = threads
        self.world_size = world_size
        self.lanes = lanes
        self.split = split
        self.unsplit = unsplit
        self.staged = staged
        self.wire_format = wire_format
        self.use(algorithm, domains)
        self.transport = Transport.HOST if host else Transport.SYMMETRIC
        size = int(workspace_mib * (1 << 20))
        if host:
            with mock.patch.object(layouts, "_C", native):
                self.layout = host_layout(world_size, lanes, size)
        else:
            share = size // (STAGED_IN_BAND_SHARE if staged else 1) if in_band else 0
            self.layout = native.make_layout(world_size, lanes, in_band_bytes=share, flagged_bytes=size - share)
        self.machine.load_kernels(world_size)
        self.buffers = [
            torch.empty(
                self.layout.total_bytes,
                dtype=torch.uint8,
                device="cpu" if host else self.device_of(rank),
                pin_memory=host and self.device.type == "cuda",
            )
            for rank in range(world_size)
        ]
        for buffer in self.buffers:
            initialize(buffer, self.layout)
            if host:
                self.machine.use_host_memory(buffer)
        self.locals = [
            torch.zeros(self.layout.local_bytes, dtype=torch.uint8, device=self.device_of(rank))
            for rank in range(world_size)
        ]
        bases = [buffer.data_ptr() for buffer in self.buffers]
        self.streams: list[Any] = [self.machine.stream(rank) for rank in range(world_size)]
        self.machine.synchronize()
        self.workspaces = [
            native.Workspace(
                rank,
                bases,
                self.layout,
                timeout_s,
                self.machine.index(rank),
                self.locals[rank].data_ptr() if host else 0,
                first_timeout_s=first_timeout_s,
            )
            for rank in range(world_size)
        ]

    def device_of(self, rank: int) -> torch.device:
        """Where a rank's tensors lie."""
        return self.machine.device_of(rank)

    def use(self, algorithm: str, domains: Sequence[int] | None = None) -> None:
        """Let LOWPRECISION run as ``two_shot``, ``ring`` or ``hierarchical`` from now on."""
        self.low_precision = LowPrecisionConfig(
            wire_format=self.wire_format,
            algorithm=LowPrecisionAlgorithm(algorithm),
            domains=None if domains is None else tuple(domains),
            min_bytes=0,
        )

    def launch_of(self, algorithm: str, message: Message) -> Launch:
        group = GroupFacts(
            world_size=self.world_size,
            device="cuda",
            transport=Transport.NONE,
            architecture=90,
        )
        config = AllReduceConfig(
            staged=StagedChoice.ON if self.staged else StagedChoice.OFF, low_precision=self.low_precision
        )
        facts = group.with_layout(self.transport, self.layout)
        launch = STRATEGIES[AllReduceStrategy(algorithm)].plan(config, facts, message)
        assert launch is not None
        if algorithm == AllReduceStrategy.LOWPRECISION and self.unsplit is not None:
            launch = self._unsplit(self.unsplit, message)
        if self.threads is not None:
            launch = dataclasses.replace(launch, threads=min(launch.threads, self.threads))
        if self.split is None or launch.staged:
            return launch
        scatter, drain = self.split
        return dataclasses.replace(launch, lanes=self.lanes, scatter_lanes=scatter, drain_lanes=drain)

    def _unsplit(self, algorithm: Algorithm, message: Message) -> Launch:
        one_step = algorithm is Algorithm.ONE_SHOT
        slots = self.layout.in_band
        return spread_packets(
            algorithm,
            Exchange.SHARED if self.transport is Transport.HOST else Exchange.PUSH,
            self.wire_format,
            packets_of(message.count, self.wire_format, 1 if one_step else self.world_size),
            slot_bytes=slots.one_shot_bytes if one_step else slots.two_shot_bytes,
            lanes=self.lanes,
            few=self.lanes,
        )

    def start(
        self,
        rank: int,
        algorithm: str,
        input_: torch.Tensor,
        output: torch.Tensor,
        stream: Stream | None = None,
    ) -> None:
        """Launch one rank's kernel, on its stream if no other is given."""
        self._start(rank, algorithm, input_, output, [], stream)

    def start_pull(self, rank: int, inputs: list[torch.Tensor], output: torch.Tensor) -> None:
        """The same for TWOSHOT reading every rank's input in place."""
        self._start(rank, "TWOSHOT", inputs[rank], output, _distances(rank, inputs))

    def start_place(
        self,
        rank: int,
        input_: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        pools: Sequence[torch.Tensor] | None = None,
        inputs: Sequence[torch.Tensor] = (),
    ) -> None:
        """The same for TWOSHOT storing its results into every rank's output, at a place that differs by rank.

        ``pools``: memory that the outputs lie in; None: it begins shortly before each. ``inputs``: of every rank, to be
        read in place.
        """
        if pools is None:
            starts = [output.data_ptr() - _C.VECTOR_BYTES * (3 + number) for number, output in enumerate(outputs)]
        else:
            starts = [pool.data_ptr() for pool in pools]
        self._start(rank, "TWOSHOT", input_, outputs[rank], _distances(rank, inputs), pools=starts)

    def _start(
        self,
        rank: int,
        algorithm: str,
        input_: torch.Tensor,
        output: torch.Tensor,
        peer_distances: list[int],
        stream: Stream | None = None,
        *,
        pools: Sequence[int] = (),
    ) -> None:
        plan = self.plan(rank, algorithm, input_, peer_distances, pools)
        assert plan(input_.data_ptr(), output.data_ptr(), (stream or self.streams[rank]).cuda_stream) == 0

    def plan(
        self,
        rank: int,
        algorithm: str,
        input_: torch.Tensor,
        peer_distances: Sequence[int] = (),
        pools: Sequence[int] = (),
    ) -> _C.Plan:
        """A rank's call for inputs like this one."""
        launch = self.launch_of(algorithm, message_of(input_))
        if peer_distances:
            launch = dataclasses.replace(launch, exchange=Exchange.PULL, scatter_lanes=0, drain_lanes=0)
        if pools:
            launch = dataclasses.replace(launch, exchange=Exchange.PLACE, drain_lanes=0)
        return plan_on(self.machine, self.workspaces[rank], launch, input_.numel(), input_.dtype, peer_distances, pools)

    def finish(self) -> None:
        """Until every rank has done all that it was given."""
        self.machine.synchronize()

    def in_band_epochs(self) -> list[torch.Tensor]:
        """Of each rank, int32[plane, lane], in place."""
        return [in_band_epochs(local, self.layout) for local in self._locals()]

    def _locals(self) -> list[torch.Tensor]:
        return self.locals if self.transport is Transport.HOST else self.buffers

    def all_reduce(self, algorithm: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Every rank's output; each is poisoned first and lies between guards that must survive.

        What the next in-band call relies on is checked afterwards: cleared slots, and epochs that agree.

        ``algorithm``: ONESHOT, TWOSHOT, LOWPRECISION, PULL for TWOSHOT that reads inputs in place, PLACE for TWOSHOT
        that stores results into all outputs, or PULLED PLACE for both.
        """
        moved = [part.to(self.device_of(rank)) for rank, part in enumerate(inputs)]
        size = inputs[0].numel() * inputs[0].element_size()
        padded = -(-size // 16) * 16
        guarded = [
            torch.full((padded + 2 * GUARD_BYTES,), 0xA5, dtype=torch.uint8, device=part.device) for part in moved
        ]
        outputs = [
            buffer[GUARD_BYTES : GUARD_BYTES + size].view(part.dtype)
            for buffer, part in zip(guarded, moved, strict=True)
        ]
        self.machine.synchronize()
        for rank in range(self.world_size):
            if algorithm == "PULL":
                self.start_pull(rank, moved, outputs[rank])
            elif algorithm == "PLACE":
                self.start_place(rank, moved[rank], outputs)
            elif algorithm == "PULLED PLACE":
                self.start_place(rank, moved[rank], outputs, inputs=moved)
            else:
                self.start(rank, algorithm, moved[rank], outputs[rank])
        self.finish()
        for rank, buffer in enumerate(guarded):
            edges = torch.cat([buffer[:GUARD_BYTES], buffer[GUARD_BYTES + size :]])
            assert bool((edges == 0xA5).all()), f"rank {rank} wrote outside its output"
        assert_at_rest(self.buffers, self._locals(), self.layout)
        return outputs
