"""Tests of what benchmarks/product_after_boundary.py reads out of a trace."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import kernel_times
from benchmarks import product_after_boundary as after


def kernel(name: str, start: float, us: float, graph: int = 7) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": us, "args": {"correlation": graph}}


def a_round(start: float, graph: int = 7) -> list[dict[str, Any]]:
    """30 us of a product and 3 that add up its parts, 5 and 4 of a boundary, 160 of the product behind it."""
    names = (
        ("nvjet_splitK_TNN", 30.0), ("cublasLt::splitKreduce_kernel", 3.0), ("sum", 5.0), ("norm", 4.0),
        ("nvjet_TNT", 160.0),
    )  # fmt: skip
    return [kernel(name, start + 10 * index, us, graph) for index, (name, us) in enumerate(names)]


def test_a_replay_is_told_apart() -> None:
    kernels = [one for index in range(after.IN_A_ROW) for one in a_round(250.0 * index)]
    found = after.of_replay(kernels)
    assert found == {"first_us": 30.0, "boundary_us": 9.0, "behind_us": 160.0, "round_us": 250.0}


def test_a_replay_without_all_products_is_refused() -> None:
    with pytest.raises(ValueError, match="2 products in a replay of 8 rounds"):
        after.of_replay(a_round(0.0))


def test_replays_come_in_the_order_of_their_launches() -> None:
    launches = [{"name": "cudaGraphLaunch", "ts": ts, "args": {"correlation": graph}} for ts, graph in ((5, 9), (1, 7))]
    events = [*launches, *a_round(100.0, 9)[::-1], *a_round(20.0), kernel("eager", 0.0, 1.0, 3)]
    assert kernel_times.replays_in(events) == [a_round(20.0), a_round(100.0, 9)]


def test_grids_have_a_lane_for_each_row_and_whole_clusters() -> None:
    for rows in (1, 8, 32, 128):
        found = list(after.grids(rows))
        assert len(set(found)) == len(found)
        assert all(shape.lanes % shape.cluster == 0 for shape in found)
        assert all(shape.lanes >= min(rows * shape.cluster, 128) for shape in found)
        assert {shape.cluster for shape in found} == {1, 2, 4, 8}
