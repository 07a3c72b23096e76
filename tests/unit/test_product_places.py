"""Tests of where benchmarks/product_places.py puts tensors."""

from __future__ import annotations

import torch

from benchmarks import product_places as places


def test_places_are_a_step_apart_and_inside_of_their_memory() -> None:
    elements = (places.PLACES * places.STEP_BYTES + 4 * places.OUT * 2) // 2
    arena = torch.empty(elements, dtype=torch.bfloat16)
    first, second = (places.placed(arena, place, 4, places.OUT) for place in (0, 1))
    assert second.data_ptr() - first.data_ptr() == places.STEP_BYTES
    assert places.placed(arena, places.PLACES - 1, 4, places.OUT).shape == (4, places.OUT)


def test_padding_lies_between_rows() -> None:
    arena = torch.empty(4 * (64 + 8), dtype=torch.bfloat16)
    padded = places.placed(arena, 0, 4, 64, padding=8)
    assert (padded.shape, padded.stride()) == ((4, 64), (72, 1))


def test_a_summary_counts_slow_places() -> None:
    line = places.summary({"rows": 8, "moved": "input", "us": [100.0, 101.0, 103.0, 108.0]})
    assert line.endswith("100.0 / 102.0 / 108.0 us; 2 of 4 places 2 % above the fastest")
