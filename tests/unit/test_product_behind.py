"""What stands before a matrix product, and where the blocks of clusters ran."""

from __future__ import annotations

from benchmarks import product_behind


def test_clusters_on_neighbouring_multiprocessors() -> None:
    assert product_behind.neighbours([0, 1, 4, 5, 7, 6]) == 3
    assert product_behind.neighbours([1, 2, 3, 4, 5, 5]) == 0


def test_every_shape_comes_once() -> None:
    for rows in product_behind.ROWS:
        found = list(product_behind.shapes(rows))
        assert len(found) == len(set(found))
        assert {(shape.early, shape.lets_in) for shape in found} == {
            (a, b) for a in (False, True) for b in (False, True)
        }
