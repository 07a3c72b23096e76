"""Loading the kernels of a group while its memory is opened: each takes a while, and neither needs the other."""

from __future__ import annotations

import logging
import time

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.attempt import Attempt

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
