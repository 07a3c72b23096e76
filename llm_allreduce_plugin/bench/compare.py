"""What runs on the ranks when candidates are compared closely: in turns, so that whatever drifts drifts for all."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.user_buffer import sizes_placed
from llm_allreduce_plugin.base.agreement import on_every_rank
from llm_allreduce_plugin.bench import messages, worker
from llm_allreduce_plugin.bench.candidates import Candidate, OurSettings
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.measure import answers, timing
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator

_groups: dict[int, RankContext] = {}
_communicators: weakref.WeakValueDictionary[int, TensorParallelCommunicator] = weakref.WeakValueDictionary()

_Output = TypeVar("_Output")
_Capturing = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        calls: in a graph, or in a row.
        replays: of the graph, or times that calls are made in a row, per round.
        rounds: turns of every candidate.
        warmup: calls before.
    """

    calls: int = timing.CALLS
    replays: int = 5
    rounds: int = 5
    warmup: int = timing.WARMUP


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Candidates at one size.

    Attributes:
        bytes: payload per rank.
        graph_us: microseconds per call by candidate: median over replays, maximum over ranks, median over rounds.
        eager_us: the same for calls from the host, but the least over rounds.
        graph_noise: how much a round of a candidate differs from its time, relative to that: the median over rounds,
            the largest of all candidates.
        eager_noise: the same for calls from the host.
        wrong: elements of answers that are wrong, by candidate, over all ranks.
    """

    bytes: int
    graph_us: dict[str, float]
    eager_us: dict[str, float]
    graph_noise: float
    eager_noise: float
    wrong: dict[str, int]

    def only(self, names: Collection[str]) -> Comparison:
        """The times of these candidates."""
        graph, eager = (
            {name: time_us for name, time_us in times.items() if name in names}
            for times in (self.graph_us, self.eager_us)
        )
        return dataclasses.replace(self, graph_us=graph, eager_us=eager)


def form_groups(context: RankContext, world_sizes: tuple[int, ...]) -> None:
    """Groups of the first ranks, which other functions here are then told by size. Collective over all ranks."""
    for size in world_sizes:
        if size == context.world_size:
            _groups[size] = context
            continue
        members = list(range(size))
        group = dist.new_group(members)
        control = dist.new_group(members, backend="gloo") if context.device.type == "cuda" else group
        if context.rank < size:
            _groups[size] = RankContext(context.rank, size, context.device, group, control)
            context.parts.append(_groups[size])


def group_of(world_size: int) -> RankContext:
    """The group of this size that :func:`form_groups` made."""
    return _groups[world_size]


def communicator_of(world_size: int) -> TensorParallelCommunicator:
    """What :func:`open_kernels` opened for the group of this size."""
    return _communicators[world_size]


def open_kernels(
    _context: RankContext, world_size: int, names: tuple[str, ...], settings: OurSettings
) -> tuple[GroupFacts, str]:
    """Candidates for strategies of this package, all in one workspace. Collective over the group of this size.

    UB is one of them where the group has registered memory, for messages that it takes when asked for by name. Where
    it would take none, none is mapped.

    Returns:
        The group's facts; and why they cannot run, or nothing.
    """

    def opened(pool: int) -> TensorParallelCommunicator:
        return _groups[world_size].communicator(
            "AUTO", transport=settings.transport, tuning_profile=settings.tuning_profile, registered_pool=pool
        )

    group = opened(0)
    with_pool = AllReduceConfig(registered_pool=settings.registered_pool)
    if "UB" in names and sizes_placed(with_pool, group.facts) is not None:
        group.close()  # whether UB places anything follows from facts that a group has only once it is open
        group = opened(settings.registered_pool or 0)
    _communicators[world_size] = group

    def bind_as(name: str) -> Callable[[torch.Tensor], Callable[[], torch.Tensor]]:
        def bind(input_: torch.Tensor) -> Callable[[], torch.Tensor]:
            call = group.call_of(name, input_.numel(), input_.dtype)
            return lambda: call(input_)

        return bind

    def bind_placing(input_: torch.Tensor) -> Callable[[], torch.Tensor]:
        # One output for all calls: captured ones would each keep their own.
        out = group.registered_empty(tuple(input_.shape), input_.dtype)
        out.fill_(float("nan"))
        call = group.call_into_of("UB", input_.numel(), input_.dtype)
        return lambda: call(input_, out)

    made = {name: Candidate(bind_as(name), exact=True, close=group.close) for name in names if name != "UB"}
    placed = sizes_placed(group.config, group.facts)
    if placed is not None and "UB" in names:
        made["UB"] = Candidate(bind_placing, exact=True, min_bytes=placed[0], max_bytes=placed[1], close=group.close)
    worker.adopt(made)
    return group.facts, _obstacle(group)


def _obstacle(group: TensorParallelCommunicator) -> str:
    decision = group.explain((1,), torch.bfloat16)
    return decision.reason if decision.launch is None else ""


def _bind(
    context: RankContext, candidate: Candidate, mine: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    return on_every_rank(lambda: messages.first_call(candidate, mine), context.control_group, RuntimeError)


def compare(
    context: RankContext, world_size: int, names: tuple[str, ...], count: int, dtype_name: str, effort: Effort
) -> Comparison:
    """Verify every candidate, and time them in turns if all are right. Collective over the group of this size.

    Every answer must be right before anything is timed, in memory that was poisoned; and again after the replays.
    """
    context = _groups[world_size]
    dtype: torch.dtype = getattr(torch, dtype_name)
    kernels = _communicators.get(world_size)  # not opened where engines' own are compared
    mine, expected = answers.make_case(context, count, dtype, () if kernels is None else kernels.facts.host_order)
    candidates = {name: worker.opened(name) for name in names}
    candidates = {
        name: candidate for name, candidate in candidates.items() if not candidate.refusal(count * dtype.itemsize)
    }
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    wrong: dict[str, int] = {}
    for name, candidate in candidates.items():
        calls[name], answer = _bind(context, candidate, mine)
        wrong[name] = messages.wrong_elements(context, candidate, answer, expected)

    def judged(name: str, answer: torch.Tensor) -> int:
        candidate = candidates[name]
        if not messages.graphs_can_be_judged(candidate):
            return 0
        return messages.wrong_elements(context, candidate, answer, expected)

    capturing = {name: candidate.capturing for name, candidate in candidates.items()}
    return time_in_turns(context, count * dtype.itemsize, calls, wrong, effort, judged, capturing)


def time_in_turns(
    context: RankContext,
    size: int,
    calls: Mapping[str, Callable[[], _Output]],
    wrong: dict[str, int],
    effort: Effort,
    judged: Callable[[str, _Output], int],
    capturing: Mapping[str, _Capturing],
) -> Comparison:
    """Time candidates in turns, if all their answers were right. Collective.

    Args:
        context: the ranks.
        size: bytes of the message, per rank.
        calls: a call of each candidate.
        wrong: elements of its first answer that are wrong.
        effort: how much to measure.
        judged: elements of a candidate's answer that are wrong. Collective.
        capturing: what a candidate wants around a graph capture.
    """
    if any(wrong.values()):
        return Comparison(size, {}, {}, 0.0, 0.0, wrong)

    def eager_samples(name: str) -> list[float]:
        return timing.eager_samples(context, calls[name], effort.calls, effort.replays)[0]

    for call in calls.values():
        for _ in range(effort.warmup):
            call()
    # What interrupts a host only ever adds time, and often more than what there is to tell apart.
    eager, eager_noise = _in_turns(context, tuple(calls), eager_samples, effort.rounds, min)
    if context.device.type != "cuda":
        return Comparison(size, {}, eager, 0.0, eager_noise, wrong)
    captured = {
        name: timing.CapturedCalls(context, call, effort.calls, effort.warmup, capturing[name])
        for name, call in calls.items()
    }
    graph, graph_noise = _in_turns(
        context, tuple(calls), lambda name: captured[name].samples(effort.replays), effort.rounds
    )
    for name, made in captured.items():
        if (answer := made.output()) is not None:
            wrong[name] += judged(name, answer)
    return Comparison(size, graph, eager, graph_noise, eager_noise, wrong)


def _in_turns(
    context: RankContext,
    names: tuple[str, ...],
    samples: Callable[[str], list[float]],
    rounds: int,
    over_rounds: Callable[[list[float]], float] = statistics.median,
) -> tuple[dict[str, float], float]:
    """Every candidate's time and the noise. Every other round goes backwards, so that no candidate is always first."""
    mine: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[:: -1 if turn % 2 else 1]:
            mine[name].append(statistics.median(samples(name)))
    everyone = context.gather(mine)
    slowest = {name: [max(times) for times in zip(*(rank[name] for rank in everyone), strict=True)] for name in mine}
    typical = {name: over_rounds(times) for name, times in slowest.items()}
    noise = max(
        (statistics.median(abs(time / typical[name] - 1) for time in times) for name, times in slowest.items()),
        default=0.0,
    )
    return {name: round(time, 3) for name, time in typical.items()}, round(noise, 4)
