"""Pools of ranks shared by the tests of a session, and markers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin.measure.ranks import RankPool

PoolFor = Callable[[int], RankPool]


class _Pools:
    """One pool at a time: many idle processes would only hold memory."""

    def __init__(self, device_type: str, cache: Path) -> None:
        self._device_type = device_type
        self._cache = cache  # an empty one: no profile of whoever runs the tests decides anything
        self._pool: RankPool | None = None

    def __call__(self, world_size: int) -> RankPool:
        pool = self._pool
        if pool is not None and (pool.world_size != world_size or not all(p.is_alive() for p in pool.processes)):
            self.close()
        if self._pool is None:
            with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(self._cache)}):
                self._pool = RankPool(world_size, self._device_type)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


@pytest.fixture(scope="session")
def cpu_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolFor]:
    pools = _Pools("cpu", tmp_path_factory.mktemp("cache"))
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def gpu_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolFor]:
    pools = _Pools("cuda", tmp_path_factory.mktemp("cache"))
    yield pools
    pools.close()


def _world_size(item: pytest.Item) -> int:
    callspec = getattr(item, "callspec", None)
    return int(callspec.params.get("world_size", 0)) if callspec is not None else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """gpu(n) tests are skipped where there are fewer than n GPUs; tests that share a pool follow each other."""
    items.sort(key=lambda item: (str(item.path), _world_size(item)))
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        needed = marker.args[0] if marker.args else 1
        if marker.kwargs.get("per_rank"):
            needed = max(needed, _world_size(item))
        if available < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), {available} here"))
