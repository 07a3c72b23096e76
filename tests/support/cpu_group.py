"""CPU ranks as threads of one process: any kernel, chunk and mix of calls on one set of workspaces."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Sequence

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from llm_allreduce_plugin.transport.symmetric import initialize
from llm_allreduce_plugin.wire import PACKETS
from tests.support.in_band_rest import EPOCH_PLANES
from tests.support.reference import poison

EPOCH_PLANES_IN_ALL = max(EPOCH_PLANES.values()) + 1


class CpuGroup:
    """``world_size`` ranks with a lane each; ``shared``: results are stored once, as the plugin's CPU ranks do."""

    def __init__(
        self, world_size: int, *, workspace_bytes: int = 1 << 20, shared: bool = True, timeout_s: float = 20.0
    ) -> None:
        self.world_size = world_size
        self.layout = _C.make_layout(
            world_size, 1, in_band_bytes=workspace_bytes, flagged_bytes=workspace_bytes, shared=shared
        )
        self.buffers = [ctypes.create_string_buffer(self.layout.total_bytes) for _ in range(world_size)]
        for buffer in self.buffers:
            initialize(torch.frombuffer(buffer, dtype=torch.uint8), self.layout)
        bases = [ctypes.addressof(buffer) for buffer in self.buffers]
        self.workspaces = [_C.Workspace(rank, bases, self.layout, timeout_s, _C.CPU) for rank in range(world_size)]

    def set_rounds(self, value: int) -> None:
        """Let every count of rounds, and every flag, be ``value`` (mod 2**32): what earlier calls left behind."""
        layout = self.layout
        word = (value % (1 << 32)).to_bytes(4, "little")
        # Between them lies how long shared messages are, which are not counts.
        for first, end in (
            (layout.epochs_offset, layout.epochs_offset + EPOCH_PLANES_IN_ALL * layout.lanes * 4),
            (layout.flags_offset, layout.probe_offset),
        ):
            words = word * ((end - first) // 4)
            for buffer in self.buffers:
                ctypes.memmove(ctypes.addressof(buffer) + first, words, len(words))

    def _words(self, rank: int, first: int, count: int) -> list[int]:
        buffer = self.buffers[rank]
        return list((ctypes.c_uint32 * count).from_buffer(buffer, first))

    def rounds(self) -> int:
        """Rounds that the two-shot's slots and their relatives have seen, on all ranks alike."""
        counts = {self._words(rank, self.layout.epochs_offset, 2)[1] for rank in range(self.world_size)}
        assert len(counts) == 1, counts
        return counts.pop()

    def two_shot_flags(self) -> set[int]:
        """What every rank has told every other of scatter and gather."""
        return {
            self._words(reader, self.layout.flags_offset, 3 * self.layout.flag_words)[
                plane * self.layout.flag_words + writer
            ]
            for reader in range(self.world_size)
            for writer in range(self.world_size)
            for plane in (1, 2)
            if reader != writer
        }

    @staticmethod
    def _unit(wire: WireFormat, algorithm: int, dtype: torch.dtype) -> int:
        packet = PACKETS[wire]
        return packet.values * dtype.itemsize if algorithm == _C.RING else packet.bytes

    def all_reduce(
        self,
        algorithm: int,
        inputs: Sequence[torch.Tensor],
        *,
        exchange: int = _C.FLAGS,
        wire: WireFormat | None = None,
        chunk: int = 1,
        domains: Sequence[int] = (),
        ranks: Sequence[int] | None = None,
        jitter: random.Random | None = None,
        in_place: bool = False,
    ) -> list[torch.Tensor]:
        """Every rank's output, poisoned first. ``chunk``: packets, or without a wire format vectors.

        ``exchange``: with PLACE, outputs lie at places that differ by rank. ``in_place``: peers read the inputs where
        they lie, and each is overwritten as soon as its rank's call has ended.

        ``jitter``: ranks come in any order, some milliseconds apart.

        Raises:
            RuntimeError: a rank's call failed.
        """
        taking_part = range(self.world_size) if ranks is None else ranks
        dtype, count = inputs[0].dtype, inputs[0].numel()
        vectors = chunk if wire is None else chunk * self._unit(wire, algorithm, dtype) // _C.VECTOR_BYTES
        outputs = [poison(torch.empty_like(part)) for part in inputs]
        statuses = dict.fromkeys(taking_part, -99)
        code = _C.WIRE_RAW if wire is None else PACKETS[wire].code
        pools = []
        if exchange == _C.PLACE:
            pools = [output.data_ptr() - (3 + rank) * _C.VECTOR_BYTES for rank, output in enumerate(outputs)]
        if in_place:
            inputs = [part.clone() for part in inputs]
        delays = {rank: jitter.choice((0.0, 0.0, 0.001, 0.003)) if jitter else 0.0 for rank in taking_part}

        def run(rank: int) -> None:
            plan = _C.Plan(
                self.workspaces[rank],
                algorithm=algorithm,
                exchange=exchange,
                wire=code,
                count=count,
                dtype=DTYPE_CODES[dtype],
                lanes=1,
                threads=32,
                chunk_vectors=vectors,
                domains=list(domains),
                peer_distances=[part.data_ptr() - inputs[rank].data_ptr() for part in inputs] if in_place else [],
                pools=pools,
            )
            time.sleep(delays[rank])
            statuses[rank] = plan(inputs[rank].data_ptr(), outputs[rank].data_ptr())
            if in_place:
                inputs[rank].fill_(float("nan"))

        threads = [threading.Thread(target=run, args=(rank,)) for rank in taking_part]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if any(statuses.values()):
            message = "; ".join(f"rank {rank}: {_C.error_string(status)}" for rank, status in statuses.items())
            raise RuntimeError(message)
        return outputs
