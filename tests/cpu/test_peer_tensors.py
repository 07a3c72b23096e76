"""Tensors in memory that ranks of one host send each other as files: peers write there, and it lives as they do."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport import mapped, symmetric
from llm_allreduce_plugin.transport.peer_visible import PeerVisibleBuffer
from llm_allreduce_plugin.transport.registered import RegisteredPool
from tests.support.file_ranks import CPU, RANKS, Scenario, driver_of
from tests.support.forked import forked, wait_until


def visible(context: RankContext, by_files: bool) -> tuple[bool, bool, int, list[Any]]:
    """Of memory that peers see: whether it is where they write, and a tensor outlives it; then what is left.

    The last is what torch was asked for.
    """
    agreement, entry_points, asked = Agreement(context.group, 30.0), Scenario().entry_points(context.rank), list[Any]()

    def by_torch(_agreement: Agreement, _group: object, _device: object, size: int) -> Any:
        asked.append(size)
        whole = torch.zeros(size, dtype=torch.uint8)
        return whole, None, [whole.data_ptr()] * RANKS

    with driver_of(entry_points), mock.patch.object(symmetric, "share", by_torch):
        buffer: Any = PeerVisibleBuffer.open(agreement, context.group, CPU, 4096, by_files=by_files)
        assert buffer.peer_distances[context.rank] == 0
        tensor, after = buffer.storage[:64].view(8, 8), (context.rank + 1) % RANKS
        assert buffer.holds(tensor)
        agreement.barrier("to have opened it")
        if by_files:
            mapped.bytes_at(tensor.data_ptr() + buffer.peer_distances[after], 64, CPU).fill_(context.rank + 1)
        else:
            tensor.fill_((context.rank - 1) % RANKS + 1)  # as the one before would
        agreement.barrier("to have written")
        before = (context.rank - 1) % RANKS
        there = bool((tensor == before + 1).all())
        buffer = None
        del buffer
        lives = bool((tensor == before + 1).all()) and any(entry_points.left().values()) == by_files
        agreement.barrier("to have looked")
        del tensor
        wait_until(lambda: not any(entry_points.left().values()))
    agreement.close()
    return there, lives, sum(entry_points.left().values()), asked


def test_memory_that_peers_see_is_mapped_alike_and_lives_as_long_as_a_tensor_of_it() -> None:
    with forked(RANKS, visible, True) as group:
        assert [group.value(rank, 60) for rank in range(RANKS)] == [(True, True, 0, [])] * RANKS


def test_memory_that_peers_see_is_torchs_where_files_cannot_be_sent() -> None:
    with forked(RANKS, visible, False) as group:
        assert [group.value(rank, 60) for rank in range(RANKS)] == [(True, True, 0, [4096])] * RANKS


def registered(context: RankContext) -> tuple[bool, bool, int]:
    """Of a registered pool: whether peers' bytes arrive, whether a tensor outlives it, and what the driver has then."""
    agreement, entry_points = Agreement(context.group, 30.0), Scenario().entry_points(context.rank)
    with driver_of(entry_points):
        pool = RegisteredPool.open(agreement, context.group, CPU, Transport.SYMMETRIC, 1 << 20, 1 << 16, by_files=True)
        output = pool.take((64,), torch.uint8)
        assert output is not None
        offset = output.data_ptr() - pool.bases[context.rank]
        after = (context.rank + 1) % RANKS
        agreement.barrier("to have taken it")
        mapped.bytes_at(pool.bases[after] + offset, 64, CPU).fill_(context.rank + 1)
        agreement.barrier("to have written")
        arrived = bool((output == (context.rank - 1) % RANKS + 1).all())
        pool.close()
        del pool
        lives = any(entry_points.left().values()) and bool((output == (context.rank - 1) % RANKS + 1).all())
        agreement.barrier("to have looked")
        del output
        wait_until(lambda: not any(entry_points.left().values()))
    agreement.close()
    return arrived, lives, sum(entry_points.left().values())


def test_registered_memory_is_mapped_alike_and_lives_as_long_as_a_tensor_of_it() -> None:
    with forked(RANKS, registered) as group:
        assert [group.value(rank, 60) for rank in range(RANKS)] == [(True, True, 0)] * RANKS
