"""Ranks on GPUs as ranks of several hosts, on one machine: NCCL takes ``NCCL_HOSTID``, as the library does.

Ranks of one host have a GPU each. Where there are fewer GPUs than ranks, those of different hosts share them: NCCL
refuses two ranks on one GPU only where they are of one host. That is slow, for kernels that wait take turns.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from llm_allreduce_plugin.base import processes
from llm_allreduce_plugin.measure import ranks

# Sockets between hosts, whatever joins the GPUs; no NVLink domain, which these hosts may well be in; no multicast.
BETWEEN = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


def gpu_of(hosts: Sequence[int], rank: int, gpus: int) -> int:
    """The GPU of a rank: its own where there are enough, otherwise that of its place on its host."""
    return rank if gpus >= len(hosts) else sum(host == hosts[rank] for host in hosts[:rank])


class GpuHosts(ranks.RankPool):
    """A pool of ranks of which each is on its host of ``hosts``. ``cache``: their folder of caches."""

    def __init__(self, hosts: Sequence[int], cache: str) -> None:
        self.hosts = tuple(hosts)
        self._cache = cache
        super().__init__(len(self.hosts), "cuda")

    def _process(self, rank: int, port: int, pipe: Connection) -> BaseProcess:
        gpu = gpu_of(self.hosts, rank, torch.cuda.device_count())
        environment = {**BETWEEN, "NCCL_HOSTID": f"host-{self.hosts[rank]}", "XDG_CACHE_HOME": self._cache}
        arguments = (os.getpid(), __name__, serve.__name__, environment, rank, self.world_size, gpu, port, pipe)
        spawn = multiprocessing.get_context("spawn")
        return spawn.Process(target=processes.run_child, args=arguments, daemon=True, name=f"rank-{rank}")


def serve(environment: dict[str, str], rank: int, world_size: int, gpu: int, port: int, pipe: Connection) -> None:
    """A rank's process. NCCL reads the environment when it is first asked for something."""
    os.environ.update(environment)
    ranks.serve(rank, world_size, f"cuda:{gpu}", port, pipe)
