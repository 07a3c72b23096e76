"""Tests of which kernels benchmarks/product_behind.py runs, and of what clusters_leave.py reads out of places."""

from __future__ import annotations

from benchmarks import clusters_leave, product_behind

LARGEST_FIRST = [126, 127, 128, 129, 130, 131, 124, 125]


def test_every_shape_comes_once_and_its_clusters_are_whole() -> None:
    found = list(product_behind.shapes())
    assert len(set(found)) == len(found)
    assert all(shape.blocks % max(shape.cluster, 1) == 0 for shape in found)
    assert {shape.cluster for shape in found} == {0, 1, 2, 4, 8}
    assert {(shape.early, shape.lets_in) for shape in found} == {(False, False), (True, False), (True, True)}


def test_where_the_turn_begins_is_read_behind_the_largest_gpcs() -> None:
    assert clusters_leave.first_gpc([*LARGEST_FIRST, 0, 1, 2, 3, 4, 5]) == 0
    assert clusters_leave.first_gpc([*LARGEST_FIRST, 10, 11, 12, 13, 14, 15, 0, 1]) == 5
