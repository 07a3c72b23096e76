"""Several hosts of emulated GPUs in one process: the halves of csrc/protocol/hosts.h, and an exchange by torch.cat."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from llm_allreduce_plugin.transport.symmetric import initialize
from llm_allreduce_plugin.wire import PACKETS
from tests.support.local_machine import LocalMachine

GUARD = 64  # elements on both sides of what a kernel writes


class HostGroup:
    """``hosts`` hosts of ``ranks`` each, all of the ranks of one host first.

    ``shared``: workspaces in host memory. ``lanes``, ``threads``: of every launch. ``slot_vectors``: that a chunk has
    at most; fewer make more rounds.
    """

    def __init__(
        self,
        machine: LocalMachine,
        hosts: int,
        ranks: int,
        *,
        shared: bool = False,
        lanes: int = 2,
        threads: int = 32,
        workspace_bytes: int = 1 << 19,
        timeout_s: float = 20.0,
    ) -> None:
        self.machine, self.hosts, self.ranks = machine, hosts, ranks
        self.lanes, self.threads = lanes, threads
        native = machine.native
        self.layout = native.make_layout(ranks, lanes, flagged_bytes=workspace_bytes, shared=shared)
        native.load_kernels(ranks)
        self.buffers = [torch.empty(self.layout.total_bytes, dtype=torch.uint8) for _ in range(hosts * ranks)]
        for buffer in self.buffers:
            initialize(buffer, self.layout)
        self.locals = [torch.zeros(self.layout.local_bytes, dtype=torch.uint8) for _ in self.buffers]
        self.streams = [machine.stream(rank) for rank in range(hosts * ranks)]
        self.workspaces = []
        for rank in range(hosts * ranks):
            first = rank // ranks * ranks
            bases = [buffer.data_ptr() for buffer in self.buffers[first : first + ranks]]
            local = self.locals[rank].data_ptr() if shared else 0
            self.workspaces.append(
                native.Workspace(rank % ranks, bases, self.layout, timeout_s, machine.index(rank), local)
            )

    @property
    def world_size(self) -> int:
        """Ranks of all hosts."""
        return self.hosts * self.ranks

    def chunk(self, two_steps: bool, wanted: int) -> int:
        """Vectors of a chunk, as many as wanted and as fit a slot."""
        slot = self.layout.flagged.one_shot_bytes // _C.VECTOR_BYTES
        return min(wanted, slot // (self.ranks if two_steps and self.layout.shared else 1))

    def run(
        self, algorithm: int, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], count: int,
        dtype: torch.dtype, chunk: int,
    ) -> None:  # fmt: skip
        """One half on all ranks, to its end."""
        hosts = self.hosts if algorithm in (_C.HOST_SUM, _C.HOST_SUM_GATHER) else 0
        for rank, workspace in enumerate(self.workspaces):
            plan = self.machine.native.Plan(
                workspace, algorithm=algorithm, exchange=_C.FLAGS, count=count, dtype=DTYPE_CODES[dtype],
                lanes=self.lanes, threads=self.threads, chunk_vectors=chunk, hosts=hosts,
            )  # fmt: skip
            assert plan(inputs[rank].data_ptr(), outputs[rank].data_ptr(), self.streams[rank].cuda_stream) == 0
        self.machine.synchronize()

    def all_reduce(
        self,
        inputs: Sequence[torch.Tensor],
        *,
        two_steps: bool,
        chunk: int = 1 << 20,
        wire: WireFormat | None = None,
    ) -> list[torch.Tensor]:
        """Every rank's output; all that kernels write is poisoned first and lies between guards that must survive.

        ``wire``: what sums travel as between hosts; None: as they are.
        """
        count, dtype = inputs[0].numel(), inputs[0].dtype
        chunk = self.chunk(two_steps, chunk)
        size = self.machine.native.sum_elements(count, self.ranks if two_steps else 1)
        sums = [_Guarded(size, torch.float32) for _ in inputs]
        outputs = [_Guarded(count, dtype) for _ in inputs]
        first = _C.REDUCE_SCATTER if two_steps else _C.REDUCE
        self.run(first, inputs, [one.inner for one in sums], count, dtype, chunk)
        sent = [one.inner for one in sums] if wire is None else self._round_trips(wire, sums, count, two_steps)
        rails = [torch.cat([sent[host * self.ranks + i] for host in range(self.hosts)]) for i in range(self.ranks)]
        gathered = [rails[rank % self.ranks] for rank in range(self.world_size)]
        second = _C.HOST_SUM_GATHER if two_steps else _C.HOST_SUM
        self.run(second, gathered, [one.inner for one in outputs], count, dtype, chunk)
        for rank, one in enumerate((*sums, *outputs)):
            assert one.is_intact(), f"rank {rank % self.world_size} wrote outside its output"
        return [one.inner for one in outputs]

    def _round_trips(
        self, wire: WireFormat, sums: Sequence[_Guarded], count: int, two_steps: bool
    ) -> list[torch.Tensor]:
        """What every rank's sum is to whom it is sent: encoded and decoded by kernels, as far as the message goes."""
        packet, native = PACKETS[wire], self.machine.native
        stream = self.streams[0].cuda_stream  # codecs run on the current device
        found, packets = [], []
        for rank, one in enumerate(sums):
            size = one.inner.numel()
            own = max(0, min(size, count - size * (rank % self.ranks))) if two_steps else count
            packets.append(torch.full((max(1, -(-own // packet.values)) * packet.bytes,), 0xA5, dtype=torch.uint8))
            found.append(_Guarded(size, torch.float32))
            code, dtype = packet.code, DTYPE_CODES[torch.float32]
            native.encode(code, dtype, one.inner.data_ptr(), own, packets[-1].data_ptr(), stream)
            native.decode(code, dtype, packets[-1].data_ptr(), own, found[-1].inner.data_ptr(), stream)
        self.machine.synchronize()
        for rank, one in enumerate(found):
            assert one.is_intact(), f"rank {rank} decoded to outside its sums"
        return [one.inner for one in found]


class _Guarded:
    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self._all = torch.empty(count + 2 * GUARD, dtype=dtype)
        self._all.view(torch.uint8).fill_(0xA5)
        self.inner = self._all[GUARD : GUARD + count]

    def is_intact(self) -> bool:
        edges = torch.cat([self._all[:GUARD], self._all[GUARD + self.inner.numel() :]])
        return bool((edges.view(torch.uint8) == 0xA5).all())
