"""Ranks that are threads of one process, and agree through the package's own agreement."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.distributed import HashStore

from llm_allreduce_plugin.base import agreement as agreements
from llm_allreduce_plugin.base.agreement import Agreement


class _Group:
    """What an agreement asks of a process group."""

    def __init__(self, store: HashStore, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size

    def get_group_store(self) -> HashStore:
        return self._store


@contextmanager
def _ranks_of_threads() -> Iterator[None]:
    with (
        mock.patch.object(agreements.dist, "get_rank", lambda group: group.rank),
        mock.patch.object(agreements.dist, "get_world_size", lambda group: group.size),
    ):
        yield


def on_thread_ranks(world_size: int, run: Callable[[Agreement], Any], wait_s: float) -> list[Any]:
    """What ``run(agreement)`` returns or raises on each rank. ``wait_s``: the deadline of a step."""
    store = HashStore()
    groups = [_Group(store, rank, world_size) for rank in range(world_size)]
    results: list[Any] = [None] * world_size

    def one(agreement: Agreement) -> None:
        try:
            results[agreement.rank] = run(agreement)
        except Exception as error:  # looked at by the caller
            results[agreement.rank] = error
        finally:
            agreement.close()

    with _ranks_of_threads():
        steps = [Agreement(group, wait_s) for group in groups]  # type: ignore[arg-type]
        threads = [threading.Thread(target=one, args=(each,), daemon=True) for each in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results
