"""Ranks of one process whose multicast memory is an ordinary buffer each, behind which kernels play the switch.

The kernels under test are the real ones: the machine code of a store to multicast memory is that of any store, only
the address differs (tests/unit/test_native_multicast.py holds it to that). On emulated GPUs such a store is another
function. No multicast object is made anywhere. See tests/emulator/soft_switch.cu.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch

from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES, Message
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange, Launch
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES
from tests.support.in_band_rest import MARKER
from tests.support.local_group import LocalGroup
from tests.support.local_machine import EmulatedGpus, Stream

SOURCE = Path(__file__).resolve().parent.parent / "emulator" / "soft_switch.cu"
EMPTY = 0x7FC12345  # SOFT_SWITCH_EMPTY
GENERATIONS = 2


class Switch(Protocol):
    """What starts the kernels of soft_switch.cu."""

    def start(self, arguments: Sequence[torch.Tensor | int]) -> None: ...

    def leave(self, stream: Stream, ended: torch.Tensor) -> None: ...


class EmulatedSwitch:
    """On an emulated GPU of its own."""

    def __init__(self, machine: EmulatedGpus, gpu: int) -> None:
        self._library = machine.library
        self._stream = machine.library.stream(gpu)

    def start(self, arguments: Sequence[torch.Tensor | int]) -> None:
        plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        self._library.soft_switch(self._stream.cuda_stream, 1, 32, plain)

    def leave(self, stream: Stream, ended: torch.Tensor) -> None:
        self._library.leave_soft_switch(stream.cuda_stream, ended.data_ptr())


@functools.cache
def _compiled(name: str, gpu: int) -> Any:
    """A kernel of soft_switch.cu, for and on one GPU. Torch wants to know of a toolkit, whose headers nobody needs."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME or "/usr/local/cuda"
    with torch.cuda.device(gpu), mock.patch.object(cpp_extension, "CUDA_HOME", home):
        return torch.cuda._compile_kernel(f"#define LLM_ALLREDUCE_SOFT_SWITCH_ON_GPU\n{SOURCE.read_text()}", name)


class GpuSwitch:
    """On a GPU of ranks, beside their kernels: all must be resident together."""

    BLOCKS, THREADS = 16, 256

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.index
        self._stream = torch.cuda.Stream(device)
        ended = torch.zeros(1, dtype=torch.int32, device=device)
        nothing = torch.zeros(2, dtype=torch.int64, device=device)
        # Loaded now: a kernel that is loaded later would wait for those that wait for it.
        self.leave(self._stream, ended)
        self._launch([nothing, nothing, nothing, 0, 1, ended, 0, 0, 1, 1])
        torch.cuda.synchronize(device)

    def start(self, arguments: Sequence[torch.Tensor | int]) -> None:
        self._launch(list(arguments))

    def _launch(self, arguments: list[torch.Tensor | int]) -> None:
        kernel = _compiled("soft_switch", self._gpu)
        with torch.cuda.device(self._gpu):
            kernel((self.BLOCKS, 1, 1), (self.THREADS, 1, 1), arguments, stream=self._stream)

    def leave(self, stream: Stream, ended: torch.Tensor) -> None:
        kernel = _compiled("soft_switch_leave", self._gpu)
        with torch.cuda.device(self._gpu):
            kernel((1, 1, 1), (1, 1, 1), [ended], stream=stream)


class Part:
    """What carries the stores of those ranks that lie on one device, to all ranks."""

    def __init__(
        self, switch: Switch, ranks: Sequence[int], sent: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]
    ) -> None:
        self.switch, self.ranks = switch, ranks
        self._device = sent[ranks[0]].device
        self.ended = torch.zeros(1, dtype=torch.int32, device=self._device)
        own = [part.data_ptr() if rank in ranks else 0 for rank, part in enumerate(sent)]
        self._tables = [
            torch.tensor(addresses, dtype=torch.int64, device=self._device)
            for addresses in (own, [part.data_ptr() for part in copies])
        ]
        self._spans = torch.zeros(0)

    def prepare(self, stretches: Sequence[tuple[int, int]]) -> None:
        """For calls that store to these (offsets, lengths) in bytes; the host must wait for it before :meth:`start`."""
        self._spans = torch.tensor(stretches, dtype=torch.int32, device=self._device) // VECTOR_BYTES
        self.ended.zero_()

    def start(self, seed: int, most_delay_ns: int, limit_ms: int) -> None:
        world_size = self._tables[0].numel()
        self.switch.start(
            [
                *self._tables, self._spans, len(self._spans), world_size, self.ended, len(self.ranks), seed,
                most_delay_ns, limit_ms,
            ]
        )  # fmt: skip


class MulticastGroup(LocalGroup):
    """A :class:`LocalGroup` whose ONESHOT, TWOSHOT and, as ``IN_SWITCH``, sums in the switch go by multicast.

    ``PUSH ONESHOT`` and ``PUSH TWOSHOT`` go without it, on the same workspaces.

    ``multicast_kib``: of multicast memory; messages that it does not hold take several rounds. ``seed``: of order and
    delays. ``most_delay_ns``: of each word to each rank; the sender's own may take four times as long. ``switches``: on
    emulated GPUs, kernels that play the switch, of which each carries what some ranks store; GPUs have one each.
    ``most_bytes``: of the messages to come, 0: any. The fewer, the less the switch looks through before it comes by a
    word again: on emulated GPUs its looks are polls, and after many polls of nothing the clock runs fast.
    """

    def __init__(
        self,
        world_size: int,
        *,
        multicast_kib: float = 256,
        seed: int = 0,
        most_delay_ns: int = 200,
        switches: int = 1,
        in_switch: bool = False,
        limit_ms: int = 600_000,
        timeout_s: float | None = None,
        **settings: Any,
    ) -> None:
        if timeout_s is None:  # on emulated GPUs time runs fast where all threads but those of the switch wait
            timeout_s = 120.0 if isinstance(settings.get("machine"), EmulatedGpus) else 20.0
        super().__init__(world_size, timeout_s=timeout_s, **settings)
        size = int(multicast_kib * 1024)
        self.seed, self.most_delay_ns, self.limit_ms = seed, most_delay_ns, limit_ms
        self.multicast = self.machine.native.make_multicast_layout(world_size, size, in_switch=in_switch)
        self.sent = [self._filled(rank, size, EMPTY) for rank in range(world_size)]
        self.copies = [self._filled(rank, size, MARKER) for rank in range(world_size)]
        for rank, workspace in enumerate(self.workspaces):
            workspace.set_multicast(self.sent[rank].data_ptr(), self.copies[rank].data_ptr(), self.multicast)
        self.parts = [Part(switch, ranks, self.sent, self.copies) for switch, ranks in self._switches(switches).items()]
        if isinstance(self.machine, EmulatedGpus):
            addresses = [[part.data_ptr() for part in parts] for parts in (self.sent, self.copies)]
            self.machine.library.make_multicast(*addresses, size)
        else:
            assert not in_switch, "no ordinary address answers to that"
        self._is_open = False
        self.most_bytes = 0
        self.machine.synchronize()

    def _filled(self, rank: int, size: int, word: int) -> torch.Tensor:
        return torch.full((size // 4,), word, dtype=torch.int32, device=self.device_of(rank))

    def _switches(self, emulated: int) -> dict[Switch, list[int]]:
        """Each with the ranks whose stores it carries."""
        ranks = range(self.world_size)
        if isinstance(self.machine, EmulatedGpus):
            return {
                EmulatedSwitch(self.machine, self.world_size + turn): list(ranks[turn::emulated])
                for turn in range(emulated)
            }
        devices = dict.fromkeys(self.device_of(rank) for rank in ranks)
        return {GpuSwitch(device): [rank for rank in ranks if self.device_of(rank) == device] for device in devices}

    def open(self) -> None:
        """Let stores arrive, until :meth:`finish`. Eager calls open by themselves; before graphs are replayed."""
        layout, most = self.multicast, self.most_bytes or self.multicast.total_bytes
        stretches = [(layout.results_offset, min(most, layout.results_bytes))]
        for slot in range(GENERATIONS * self.world_size):
            at = layout.one_shot_offset + slot * layout.one_shot_bytes
            stretches.append((at, min(most, layout.one_shot_bytes)))
        for part in self.parts:
            part.prepare(stretches)
        self.machine.synchronize()
        for part in self.parts:
            self.seed += 1
            part.start(self.seed, self.most_delay_ns, self.limit_ms)
        self._is_open = True

    def all_reduce(self, algorithm: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        size = inputs[0].numel() * inputs[0].element_size()
        self.most_bytes = -(-size // VECTOR_BYTES) * VECTOR_BYTES
        try:
            return super().all_reduce(algorithm, inputs)
        finally:
            self.most_bytes = 0

    def _start(self, *arguments: Any, **keywords: Any) -> None:
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not self._is_open and not capturing:
            self.open()
        super()._start(*arguments, **keywords)

    def finish(self) -> None:
        if self._is_open:
            for part in self.parts:
                for rank in part.ranks:
                    part.switch.leave(self.streams[rank], part.ended)
        self._is_open = False
        super().finish()
        self.assert_at_rest()

    def launch_of(self, algorithm: str, message: Message) -> Launch:
        if algorithm.startswith("PUSH "):  # shares slots and counts with those that go by multicast
            return super().launch_of(algorithm.removeprefix("PUSH "), message)
        in_switch = algorithm == "IN_SWITCH"
        launch = super().launch_of("TWOSHOT" if in_switch else algorithm, message)
        layout, parts = self.multicast, 1 if launch.algorithm is Algorithm.ONE_SHOT else self.world_size
        room = layout.one_shot_bytes if parts == 1 else layout.results_bytes // parts
        if in_switch:
            room = min(room, layout.inputs_bytes // parts)
        chunk = max(1, min(launch.chunk_vectors, room // VECTOR_BYTES))  # without room, the call is refused
        vectors = -(-message.count * ELEMENT_BYTES[message.dtype] // VECTOR_BYTES)
        changes: dict[str, Any] = {"chunk_vectors": chunk, "rounds": max(1, -(-vectors // (chunk * parts)))}
        if parts == 1 or in_switch:  # no kernel has lanes with one task
            changes |= {"scatter_lanes": 0, "drain_lanes": 0}
        return dataclasses.replace(launch, exchange=Exchange.IN_SWITCH if in_switch else Exchange.MULTICAST, **changes)

    def assert_at_rest(self) -> None:
        """What the next call relies on: everything carried, everything taken and cleared, on every rank."""
        first_input = self.multicast.inputs_offset // 4 if self.multicast.inputs_bytes else None
        for rank in range(self.world_size):
            on_its_way = int((self.sent[rank][:first_input] != EMPTY).sum())
            assert on_its_way == 0, f"rank {rank}: {on_its_way} words were never carried"
            left = (self.copies[rank][:first_input] != MARKER).nonzero().flatten()
            assert len(left) == 0, (
                f"rank {rank}: {len(left)} words of multicast memory were not cleared, the first at byte "
                f"{4 * int(left[0])} (results begin at {self.multicast.results_offset})"
            )
