"""Ordinary kernels between timed calls: matrix products of the shape that layers of a model have in decode."""

from __future__ import annotations

import torch

from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.measure.timing import CALLS, REPLAYS, WARMUP, time_graph


class MatrixProduct:
    """``(rows, inner) x (inner, columns)`` of random numbers, as a linear layer with dense weights runs it.

    Args:
        context: this rank.
        rows: tokens of a batch.
        inner: elements that are summed for each result, on this rank.
        columns: elements of a row of the result.
        dtype: of all three.
    """

    def __init__(self, context: RankContext, rows: int, inner: int, columns: int, dtype: torch.dtype) -> None:
        self._context = context
        self._input = torch.randn(rows, inner, device=context.device).to(dtype)
        self._weights = torch.randn(inner, columns, device=context.device).to(dtype)
        self._output = torch.empty(rows, columns, device=context.device, dtype=dtype)

    def run(self) -> None:
        """On the current stream."""
        torch.mm(self._input, self._weights, out=self._output)

    def time_us(self, calls: int = CALLS, replays: int = REPLAYS, warmup: int = WARMUP) -> float:
        """Microseconds of one, in a CUDA graph of nothing else. Collective."""
        return time_graph(self._context, self.run, calls, replays, warmup).median
