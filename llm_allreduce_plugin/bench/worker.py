"""What runs on the ranks of a benchmark: one candidate at one size at a time, verified before and after it is timed.

Candidates are those of sums alone, or of sums with a norm behind them (``Options.hidden``); only what a message is
differs, see :mod:`~llm_allreduce_plugin.bench.messages`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from llm_allreduce_plugin.base.agreement import on_every_rank
from llm_allreduce_plugin.bench import candidates, norm_candidates
from llm_allreduce_plugin.bench.candidates import Candidate, OurSettings
from llm_allreduce_plugin.bench.messages import Message, NormMessage, SumMessage, graphs_can_be_judged
from llm_allreduce_plugin.bench.norm_candidates import NormCandidate
from llm_allreduce_plugin.measure import timing
from llm_allreduce_plugin.measure.products import MatrixProduct
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.quantization import QuantKind

ROW = 8192  # elements: the hidden size of the models in docs/performance.md
LEAST_US = 0.01  # what a call adds that is hidden wholly, as far as clocks tell
_open: dict[str, Any] = {}  # Candidate, or NormCandidate


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        dtype: as torch spells it.
        calls: calls in a graph, or in a row.
        replays: times that they are measured.
        warmup: calls before.
        check: compare results.
        hidden: elements of a row that is normed; None: sums alone.
        quant: how the norm is quantized; None: it is not.
        between: in a graph, a matrix product of this inner dimension stands before each call, with as many rows of
            ``hidden`` (or :data:`ROW`) elements as the message, at least one; 0: nothing does.
    """

    dtype: str
    calls: int = timing.CALLS
    replays: int = timing.REPLAYS
    warmup: int = timing.WARMUP
    check: bool = True
    hidden: int | None = None
    quant: QuantKind | None = None
    between: int = 0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One candidate at one size. Times in microseconds per call, None where there are none.

    Attributes:
        candidate: whose.
        bytes: payload per rank.
        count: elements per rank.
        eager_us: calls from the host in a row.
        graph_us: calls in a CUDA graph; with products between them, what the calls add to those.
        eager_wrong: elements of the answer that are wrong, over all ranks; None when not checked.
        graph_wrong: the same for the last replay.
        left_out: why nothing was measured.
        product_us: the product before each call in the graph, alone; None where there is none.
    """

    candidate: str
    bytes: int
    count: int
    eager_us: float | None = None
    graph_us: float | None = None
    eager_wrong: int | None = None
    graph_wrong: int | None = None
    left_out: str = ""
    product_us: float | None = None

    @property
    def time_us(self) -> float | None:
        """In a graph where there is one."""
        return self.eager_us if self.graph_us is None else self.graph_us


def open_all(
    context: RankContext, names: tuple[str, ...], settings: OurSettings, options: Options | None = None
) -> dict[str, str]:
    """Open candidates; for those that cannot run, why. ``options``: None for sums alone."""
    refused = {}
    for name in names:
        try:
            _open[name] = _open_candidate(context, name, settings, options.hidden if options else None)
        except RuntimeError as error:
            refused[name] = str(error)
    return refused


def _open_candidate(
    context: RankContext, name: str, settings: OurSettings, hidden: int | None
) -> Candidate | NormCandidate:
    if hidden is None:
        return candidates.open_candidate(context, name, settings)
    return norm_candidates.open_candidate(context, name, settings, hidden)


def adopt(candidates: dict[str, Candidate]) -> None:
    """Take in candidates that were opened elsewhere."""
    _open.update(candidates)


def close_all(context: RankContext) -> None:
    """Let go of everything."""
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
    for candidate in _open.values():
        candidate.close()
    _open.clear()


def opened(name: str) -> Candidate:
    """A candidate for sums that :func:`open_all` opened."""
    candidate: Candidate = _open[name]
    return candidate


def _message(context: RankContext, count: int, options: Options) -> Message[Any, Any]:
    dtype: torch.dtype = getattr(torch, options.dtype)
    if options.hidden is None:
        return SumMessage(context, count, dtype)
    return NormMessage(context, count, dtype, options.hidden, options.quant)


def measure(context: RankContext, name: str, count: int, options: Options) -> Measurement:
    """Collective. The same on every rank."""
    candidate = _open[name]
    row = Measurement(name, count * getattr(torch, options.dtype).itemsize, count)
    message = _message(context, count, options)
    if (refusal := message.refusal(candidate)) is not None:
        return dataclasses.replace(row, left_out=refusal)
    try:
        call, output = on_every_rank(lambda: message.first_call(candidate), context.control_group, RuntimeError)
    except RuntimeError as error:
        return dataclasses.replace(row, left_out=str(error))
    expected = message.expected() if options.check else None

    def wrong(answer: Any) -> int | None:  # noqa: ANN401  (a tensor, or several)
        return None if expected is None or answer is None else message.wrong(candidate, answer, expected)

    eager_wrong = wrong(output)
    eager = timing.time_eager(context, call, options.calls, options.replays, options.warmup)
    if not candidate.in_place and options.check:
        eager_wrong = max(eager_wrong or 0, wrong(eager.output) or 0)
    row = dataclasses.replace(row, eager_us=round(eager.median, 2), eager_wrong=eager_wrong)
    if context.device.type != "cuda":
        return row
    product = _product(context, row.count, options) if options.between else None
    product_us = product.time_us(options.calls, options.replays, options.warmup) if product else 0.0

    def timed() -> Any:  # noqa: ANN401
        if product is not None:
            product.run()
        return call()

    graph = timing.time_graph(context, timed, options.calls, options.replays, options.warmup, candidate.capturing)
    graph_wrong = wrong(graph.output) if graphs_can_be_judged(candidate) else eager_wrong
    added = max(graph.median - product_us, LEAST_US)
    row = dataclasses.replace(row, graph_us=round(added, 2), graph_wrong=graph_wrong)
    return dataclasses.replace(row, product_us=round(product_us, 2)) if product else row


def _product(context: RankContext, count: int, options: Options) -> MatrixProduct:
    hidden = options.hidden or ROW
    dtype: torch.dtype = getattr(torch, options.dtype)
    return MatrixProduct(context, max(1, count // hidden), options.between, hidden, dtype)
