"""Tests of which kernels benchmarks/product_behind.py runs."""

from __future__ import annotations

from benchmarks import product_behind


def test_shapes_are_measured_once_for_each_number_of_rows() -> None:
    for rows in product_behind.ROWS:
        found = list(product_behind.shapes(rows))
        assert len(set(found)) == len(found)
        assert found[0].blocks == rows


def test_a_cluster_has_all_of_its_blocks() -> None:
    found = list(product_behind.left_shapes())
    assert len(set(found)) == len(found)
    assert all(shape.blocks % shape.cluster == 0 for shape in found)
    assert {shape.cluster for shape in found} == {1, 2, 4, 8}
