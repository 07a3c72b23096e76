"""What runs on the ranks of a benchmark: one candidate at one size at a time, verified before and after it is timed."""

from __future__ import annotations

import dataclasses

import torch

from llm_allreduce_plugin.base.agreement import on_every_rank
from llm_allreduce_plugin.bench.candidates import Bound, Candidate, OurSettings, open_candidate
from llm_allreduce_plugin.measure import answers, timing
from llm_allreduce_plugin.measure.ranks import RankContext

_open: dict[str, Candidate] = {}


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        dtype: as torch spells it.
        calls: calls in a graph, or in a row.
        replays: times that they are measured.
        warmup: calls before.
        check: compare results.
    """

    dtype: str
    calls: int = timing.CALLS
    replays: int = timing.REPLAYS
    warmup: int = timing.WARMUP
    check: bool = True


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One candidate at one size. Times in microseconds per call, None where there are none.

    Attributes:
        candidate: whose.
        bytes: payload per rank.
        count: elements per rank.
        eager_us: calls from the host in a row.
        graph_us: calls in a CUDA graph.
        eager_wrong: elements of the answer that are wrong, over all ranks; None when not checked.
        graph_wrong: the same for the last replay.
        left_out: why nothing was measured.
    """

    candidate: str
    bytes: int
    count: int
    eager_us: float | None = None
    graph_us: float | None = None
    eager_wrong: int | None = None
    graph_wrong: int | None = None
    left_out: str = ""

    @property
    def time_us(self) -> float | None:
        """In a graph where there is one."""
        return self.eager_us if self.graph_us is None else self.graph_us


def open_all(context: RankContext, names: tuple[str, ...], settings: OurSettings) -> dict[str, str]:
    """Open candidates; for those that cannot run, why."""
    refused = {}
    for name in names:
        try:
            _open[name] = open_candidate(context, name, settings)
        except RuntimeError as error:
            refused[name] = str(error)
    return refused


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


def first_call(candidate: Candidate, mine: torch.Tensor) -> tuple[Bound, torch.Tensor]:
    """The call for one input, and its answer, in memory that was poisoned first.

    The allocator gives the output what was freed last. Where it does not, that memory has no right answer either: the
    input is from a fresh seed.
    """
    call = candidate.bind(mine)
    poison = torch.full_like(mine, float("nan"))
    del poison
    return call, call()


def wrong_elements(context: RankContext, candidate: Candidate, answer: torch.Tensor, expected: torch.Tensor) -> int:
    """Elements of a candidate's answer that are not what they must be, over all ranks. Collective."""
    if candidate.most_error is not None:
        digests = context.gather(answers.digest(answer))
        alike = all(other == digests[0] for other in digests)
        bad = 0 if alike and answers.relative_error(answer, expected) <= candidate.most_error else answer.numel()
    else:
        bad = answers.wrong_elements(answer, expected, exact=candidate.exact, world_size=context.world_size)
    return int(sum(context.gather(bad)))


def opened(name: str) -> Candidate:
    """A candidate that :func:`open_all` opened."""
    return _open[name]


def measure(context: RankContext, name: str, count: int, options: Options) -> Measurement:
    """Collective. The same on every rank."""
    candidate = _open[name]
    dtype = getattr(torch, options.dtype)
    size = count * dtype.itemsize
    row = Measurement(name, size, count)
    if (refusal := candidate.refusal(size)) is not None:
        return dataclasses.replace(row, left_out=refusal)
    seed = context.shared_seed()
    mine = answers.make_input(seed, context.rank, count, dtype, context.device)
    try:
        call, output = on_every_rank(lambda: first_call(candidate, mine), context.control_group, RuntimeError)
    except RuntimeError as error:
        return dataclasses.replace(row, left_out=str(error))

    expected = None
    if options.check:
        expected = answers.rank_ordered_sum(seed, context.world_size, count, dtype, context.device)

    def wrong(answer: torch.Tensor | None) -> int | None:
        return None if expected is None or answer is None else wrong_elements(context, candidate, answer, expected)

    eager_wrong = wrong(output)
    eager = timing.time_eager(context, call, options.calls, options.replays, options.warmup)
    if not candidate.in_place:
        eager_wrong = max(eager_wrong or 0, wrong(eager.output) or 0) if options.check else None
    row = dataclasses.replace(row, eager_us=round(eager.median, 2), eager_wrong=eager_wrong)
    if context.device.type != "cuda":
        return row
    graph = timing.time_graph(context, call, options.calls, options.replays, options.warmup, candidate.capturing)
    # In place, the answer of one call is the input of the next: what was checked is the first.
    graph_wrong = eager_wrong if candidate.in_place else wrong(graph.output)
    return dataclasses.replace(row, graph_us=round(graph.median, 2), graph_wrong=graph_wrong)
