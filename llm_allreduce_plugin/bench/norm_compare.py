"""What runs on the ranks when a norm in the kernel of the sum is compared closely with one in a kernel of its own."""

from __future__ import annotations

import functools

import torch

from llm_allreduce_plugin.algorithms import fused
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.ranges import ONE_KERNEL, TWO_KERNELS
from llm_allreduce_plugin.base.agreement import on_every_rank
from llm_allreduce_plugin.bench import compare
from llm_allreduce_plugin.bench.compare import Comparison, Effort
from llm_allreduce_plugin.bench.messages import NormMessage
from llm_allreduce_plugin.bench.norm_candidates import EPS, Bound, NormCandidate, NormCase
from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.norm import Normed, ScaleLayout
from llm_allreduce_plugin.runtime.norm_calls import NormCall, NormShape


def _candidate(call: NormCall) -> NormCandidate:
    def bind(case: NormCase) -> Bound:
        return lambda: call(case.input, case.residual, case.weight, case.quant)

    return NormCandidate(bind, lambda _case: None, exact=True)


def strategy_in_one_kernel(facts: GroupFacts, strategy: str, payload_bytes: int) -> str:
    """The strategy by which one kernel runs as AUTO's does where AUTO chooses ``strategy`` for the sum alone.

    Who asks for TWOSHOT by name gets two steps in one kernel, too; with AUTO it may take one.
    """
    if strategy == AllReduceStrategy.TWOSHOT and fused.takes_one_step(facts, payload_bytes):
        return AllReduceStrategy.ONESHOT
    return strategy


def compare_norms(
    _context: RankContext, world_size: int, strategy: str, rows: int, hidden: int, dtype_name: str, effort: Effort
) -> Comparison | str:
    """Verify and time both ways of ``strategy`` in turns, in its group. Collective over the group of this size.

    As AUTO runs them where it chooses ``strategy`` for the sum alone: one kernel may then take one step instead of two.

    Returns:
        Times of ``ONE_KERNEL`` and ``TWO_KERNELS``; or why nothing is fused here.
    """
    context = compare.group_of(world_size)
    communicator = compare.communicator_of(world_size)
    dtype: torch.dtype = getattr(torch, dtype_name)
    shape = NormShape(
        rows, hidden, dtype, EPS, weight_bias=0.0, adds=True, quant=None, layout=ScaleLayout.ROWS, scale_stride=0,
        return_norm=False,
    )  # fmt: skip
    in_one_kernel = strategy_in_one_kernel(communicator.facts, strategy, rows * hidden * dtype.itemsize)
    try:  # pure: on all ranks or on none
        candidates = {
            ONE_KERNEL: _candidate(communicator.norm_call_of(in_one_kernel, shape, fused=True)),
            TWO_KERNELS: _candidate(communicator.norm_call_of(strategy, shape, fused=False)),
        }
    except RuntimeError as error:
        return str(error)
    message = NormMessage(context, rows * hidden, dtype, hidden, None)
    expected = message.expected()

    def judged(name: str, answer: Normed) -> int:
        return message.wrong(candidates[name], answer, expected)

    calls: dict[str, Bound] = {}
    wrong: dict[str, int] = {}
    for name, candidate in candidates.items():
        first = functools.partial(message.first_call, candidate)
        calls[name], answer = on_every_rank(first, context.control_group, RuntimeError)
        wrong[name] = judged(name, answer)
    capturing = {name: candidate.capturing for name, candidate in candidates.items()}
    return compare.time_in_turns(context, rows * hidden * dtype.itemsize, calls, wrong, effort, judged, capturing)
