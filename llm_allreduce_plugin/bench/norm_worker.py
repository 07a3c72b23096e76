"""What runs on the ranks of a benchmark of norms behind all-reduces: verified before and after it is timed.

The functions are those of :mod:`~llm_allreduce_plugin.bench.worker`.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from llm_allreduce_plugin.base.agreement import on_every_rank
from llm_allreduce_plugin.bench import worker
from llm_allreduce_plugin.bench.candidates import OurSettings
from llm_allreduce_plugin.bench.norm_candidates import EPS, Bound, NormCandidate, NormCase, open_candidate
from llm_allreduce_plugin.bench.worker import Measurement
from llm_allreduce_plugin.measure import answers, norm_answers, timing
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.norm import Normed, QuantKind

_open: dict[str, NormCandidate] = {}


@dataclasses.dataclass(frozen=True)
class Options(worker.Options):
    """How to measure.

    Attributes:
        hidden: elements of a row.
        quant: how the norm is quantized; None: it is not.
    """

    hidden: int = 8192
    quant: QuantKind | None = None


def open_all(context: RankContext, names: tuple[str, ...], settings: OurSettings, options: Options) -> dict[str, str]:
    """Open candidates; for those that cannot run, why."""
    refused = {}
    for name in names:
        try:
            _open[name] = open_candidate(context, name, settings, options.hidden)
        except RuntimeError as error:
            refused[name] = str(error)
    return refused


def close_all(context: RankContext) -> None:
    """Let go of everything."""
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
    for candidate in _open.values():
        candidate.close()
    _open.clear()


def first_call(candidate: NormCandidate, case: NormCase) -> tuple[Bound, Normed]:
    """The call for one case, and its answer, in memory that was poisoned first; see ``worker.first_call``."""
    call = candidate.bind(case)
    poison = [torch.full_like(case.input, float("nan")) for _ in range(2)]
    del poison
    return call, call()


def make_case(
    context: RankContext, rows: int, hidden: int, dtype: torch.dtype, quant: QuantKind | None, *, check: bool = True
) -> tuple[NormCase, Normed | None]:
    """This rank's arguments from a fresh seed; and, with ``check``, what must come out. Collective."""
    seed, count = context.shared_seed(), rows * hidden
    mine = answers.make_input(seed, context.rank, count, dtype, context.device).view(rows, hidden)
    residual, weight = norm_answers.make_beside(seed, rows, hidden, dtype, context.device)
    case = NormCase(mine, residual, weight, norm_answers.make_quant(quant, context.device))
    if not check:
        return case, None
    total = answers.rank_ordered_sum(seed, context.world_size, count, dtype, context.device).view_as(mine)
    return case, norm_answers.expected(total, residual, weight, EPS, case.quant)


def measure(context: RankContext, name: str, count: int, options: Options) -> Measurement:
    """Collective. The same on every rank."""
    candidate = _open[name]
    dtype: torch.dtype = getattr(torch, options.dtype)
    row = Measurement(name, count * dtype.itemsize, count)
    rows = count // options.hidden
    case, expected = make_case(context, rows, options.hidden, dtype, options.quant, check=options.check)
    if (refusal := candidate.refusal(case)) is not None:
        return dataclasses.replace(row, left_out=refusal)
    try:
        call, output = on_every_rank(lambda: first_call(candidate, case), context.control_group, RuntimeError)
    except RuntimeError as error:
        return dataclasses.replace(row, left_out=str(error))
    wrong = functools.partial(wrong_elements, context, candidate, expected)
    eager_wrong = wrong(output)
    eager = timing.time_eager(context, call, options.calls, options.replays, options.warmup)
    if not candidate.in_place and options.check:
        eager_wrong = max(eager_wrong or 0, wrong(eager.output) or 0)
    row = dataclasses.replace(row, eager_us=round(eager.median, 2), eager_wrong=eager_wrong)
    if context.device.type != "cuda":
        return row
    graph = timing.time_graph(context, call, options.calls, options.replays, options.warmup, candidate.capturing)
    graph_wrong = eager_wrong if candidate.in_place else wrong(graph.output)
    return dataclasses.replace(row, graph_us=round(graph.median, 2), graph_wrong=graph_wrong)


def wrong_elements(
    context: RankContext, candidate: NormCandidate, expected: Normed | None, answer: Normed | None
) -> int | None:
    """Elements of an answer that are not what they must be, over all ranks; None when nobody looks. Collective."""
    if expected is None or answer is None:
        return None
    bad = norm_answers.wrong_elements(answer, expected, exact=candidate.exact, world_size=context.world_size)
    return int(sum(context.gather(bad)))
