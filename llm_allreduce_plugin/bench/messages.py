"""One message of a benchmark on one rank: what goes in, what must come out, and how an answer is judged.

Of sums alone, and of sums with residual and norm behind them. All methods of a message but ``refusal`` are collective,
or may be: they are called on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from llm_allreduce_plugin.bench.candidates import Candidate
from llm_allreduce_plugin.bench.norm_candidates import EPS, NormCandidate, NormCase
from llm_allreduce_plugin.measure import answers, norm_answers
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.norm import Normed, QuantKind

C_contra = TypeVar("C_contra", contravariant=True)  # a kind of candidate
A = TypeVar("A")  # what its calls return


class Message(Protocol[C_contra, A]):
    """What a measurement needs to know of a message."""

    def refusal(self, candidate: C_contra) -> str | None:
        """Why a candidate does not take it, or None."""

    def first_call(self, candidate: C_contra) -> tuple[Callable[[], A], A]:
        """A candidate's call, and its answer, in memory that was poisoned first."""

    def expected(self) -> A:
        """The right answer."""

    def wrong(self, candidate: C_contra, answer: A, expected: A) -> int:
        """Elements of an answer that are not what they must be, over all ranks."""


def graphs_can_be_judged(candidate: Candidate | NormCandidate) -> bool:
    """Whether a graph's last answer is of its input: in place, it is of the answer of the call before.

    Of those for which it is not, what is checked is an answer outside of graphs.
    """
    return not (candidate.in_place or candidate.graphs_overwrite)


def first_call(candidate: Candidate, mine: torch.Tensor) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """The call for one input, and its answer, in memory that was poisoned first.

    The allocator gives the output what was freed last. Where it does not, that memory has no right answer either: the
    input is from a fresh seed.
    """
    call = candidate.bind(mine)
    poison = torch.full_like(mine, float("nan"))
    del poison
    return call, call()


def wrong_elements(context: RankContext, candidate: Candidate, answer: torch.Tensor, expected: torch.Tensor) -> int:
    """Elements of a candidate's sum that are not what they must be, over all ranks. Collective."""
    if candidate.most_error is not None:
        digests = context.gather(answers.digest(answer))
        alike = all(other == digests[0] for other in digests)
        bad = 0 if alike and answers.relative_error(answer, expected) <= candidate.most_error else answer.numel()
    else:
        bad = answers.wrong_elements(answer, expected, exact=candidate.exact, world_size=context.world_size)
    return int(sum(context.gather(bad)))


class SumMessage:
    """``count`` elements that are summed."""

    def __init__(self, context: RankContext, count: int, dtype: torch.dtype) -> None:
        self._context, self._count, self._dtype = context, count, dtype

    @functools.cached_property
    def _seed(self) -> int:
        return self._context.shared_seed()

    def refusal(self, candidate: Candidate) -> str | None:
        """By its size."""
        return candidate.refusal(self._count * self._dtype.itemsize)

    def first_call(self, candidate: Candidate) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
        """See :func:`first_call`."""
        context = self._context
        mine = answers.make_input(self._seed, context.rank, self._count, self._dtype, context.device)
        return first_call(candidate, mine)

    def expected(self) -> torch.Tensor:
        """The rank-ordered sum."""
        context = self._context
        return answers.rank_ordered_sum(self._seed, context.world_size, self._count, self._dtype, context.device)

    def wrong(self, candidate: Candidate, answer: torch.Tensor, expected: torch.Tensor) -> int:
        """See :func:`wrong_elements`."""
        return wrong_elements(self._context, candidate, answer, expected)


class NormMessage:
    """``count`` elements in rows of ``hidden``, to which a residual is added, and which are normed."""

    def __init__(
        self, context: RankContext, count: int, dtype: torch.dtype, hidden: int, quant: QuantKind | None
    ) -> None:
        self._context = context
        self._seed = context.shared_seed()
        rows = count // hidden
        mine = answers.make_input(self._seed, context.rank, count, dtype, context.device).view(rows, hidden)
        residual, weight = norm_answers.make_beside(self._seed, rows, hidden, dtype, context.device)
        self._case = NormCase(mine, residual, weight, norm_answers.make_quant(quant, context.device))

    def refusal(self, candidate: NormCandidate) -> str | None:
        """By its rows, its type and its quantization."""
        return candidate.refusal(self._case)

    def first_call(self, candidate: NormCandidate) -> tuple[Callable[[], Normed], Normed]:
        """As :func:`first_call`, with memory for two outputs."""
        call = candidate.bind(self._case)
        poison = [torch.full_like(self._case.input, float("nan")) for _ in range(2)]
        del poison
        return call, call()

    def expected(self) -> Normed:
        """What the oracle says of the rank-ordered sum."""
        context, case = self._context, self._case
        total = answers.rank_ordered_sum(
            self._seed, context.world_size, case.input.numel(), case.input.dtype, context.device
        )
        return norm_answers.expected(total.view_as(case.input), case.residual, case.weight, EPS, case.quant)

    def wrong(self, candidate: NormCandidate, answer: Normed, expected: Normed) -> int:
        """In all tensors of the answer together."""
        bad = norm_answers.wrong_elements(
            answer, expected, exact=candidate.exact, world_size=self._context.world_size, quant=self._case.quant
        )
        return int(sum(self._context.gather(bad)))
