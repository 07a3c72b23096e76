"""Tests of which kernels benchmarks/product_behind.py runs."""

from __future__ import annotations

from benchmarks import product_behind


def test_every_shape_comes_once_and_its_clusters_are_whole() -> None:
    found = list(product_behind.shapes())
    assert len(set(found)) == len(found)
    assert all(shape.blocks % shape.cluster == 0 for shape in found)
    assert {shape.cluster for shape in found} == {1, 2, 4, 8}
    assert {(shape.early, shape.lets_in) for shape in found} == {(False, False), (True, False), (True, True)}
