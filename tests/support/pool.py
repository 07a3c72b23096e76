"""Pools of CPU ranks that start in a moment: forked from a server that has loaded torch, as `forked.py` does it."""

from __future__ import annotations

import os
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from llm_allreduce_plugin.measure import ranks
from tests.support.forked import server


def _serve(cache: Path, rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.setpgid(0, 0)  # Ctrl-C is for whoever made the pool
    os.environ["XDG_CACHE_HOME"] = str(cache)  # the environment is that of the server, from when it was started
    ranks.serve(rank, world_size, "cpu", port, pipe)


class ForkedPool(ranks.RankPool):
    """As a pool of CPU ranks that are spawned. Ranks end when their pipe does, with whoever made the pool.

    ``cache``: their folder of caches.
    """

    def __init__(self, world_size: int, cache: Path) -> None:
        self._cache = cache
        super().__init__(world_size, "cpu")

    def _process(self, rank: int, port: int, pipe: Connection) -> BaseProcess:
        forkserver.ensure_running()  # here, where signals are not held: whatever it forks would inherit that
        return server.Process(
            target=_serve, args=(self._cache, rank, self.world_size, port, pipe), daemon=True, name=f"rank-{rank}"
        )
