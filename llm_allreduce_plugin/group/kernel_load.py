"""Loading the kernels of a group while its memory is opened: each takes a while, and neither needs the other.

Where none is opened, only the norm behind the engine's own all-reduce is left, which :func:`prove_norm` tries.
"""

from __future__ import annotations

import logging
import time

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.facts import DTYPE_CODES
from llm_allreduce_plugin.base.attempt import Attempt
from llm_allreduce_plugin.quantization import UNIT

logger = logging.getLogger(__name__)


class KernelLoad:
    """Of one start, onto ``device``. By world size: the ranks of a host may be fewer than those of the group."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._under_way: dict[int, Attempt[None]] = {}
        self._loaded: set[int] = set()

    def begin(self, world_size: int) -> None:
        """Begin, in a thread. Kernels that are loaded, or being loaded, are left at that."""
        if world_size in self._loaded or world_size in self._under_way:
            return

        def load() -> None:
            began = time.monotonic()
            with torch.cuda.device(self._device):
                _C.load_kernels(world_size)
            logger.debug("kernels for %d ranks were loaded in %.2f s", world_size, time.monotonic() - began)

        self._under_way[world_size] = Attempt(load, "kernels")

    def end(self, world_size: int, wait_s: float) -> None:
        """Wait for what :meth:`begin` has begun.

        Raises:
            RuntimeError: what CUDA says, or that it has not ended after ``wait_s`` seconds.
        """
        if world_size in self._loaded:
            return
        if not self._under_way[world_size].wait(wait_s):
            message = f"kernels are not loaded after {wait_s:g} s"
            raise RuntimeError(message)
        self._under_way.pop(world_size).result()
        self._loaded.add(world_size)


def prove_norm(device: torch.device) -> None:
    """Norm one row, as calls do behind the engine's own all-reduce.

    Raises:
        RuntimeError: what CUDA says, where the kernel cannot be loaded or does not run.
    """
    row, out = torch.ones(UNIT, device=device), torch.empty(UNIT, device=device)
    tensors = _C.NormTensors(weight=row.data_ptr(), norm_out=out.data_ptr())
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    index, total = device.index if on_gpu else _C.CPU, torch.empty_like(row)
    code = DTYPE_CODES["float32"]
    _C.rms_norm(_C.Norm(UNIT, 1e-5), tensors, row.data_ptr(), total.data_ptr(), UNIT, code, index, stream)
    if on_gpu:
        torch.cuda.current_stream(device).synchronize()
