"""The start of multicast in a group: opened, proved, compared. Where any of it fails, all goes on without.

But for one thing: a call whose stores do not arrive ends as every expired wait does, and no kernel runs in that process
any more. Nothing can go on there; the start fails on all ranks, and says what to set.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.base import KernelStrategy, Message
from llm_allreduce_plugin.algorithms.decision import Launch
from llm_allreduce_plugin.algorithms.facts import DTYPE_CODES, GroupFacts
from llm_allreduce_plugin.algorithms.one_shot import OneShot
from llm_allreduce_plugin.algorithms.two_shot import TwoShot
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.base.cleanup import let_go
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, MulticastChoice
from llm_allreduce_plugin.errors import StartError, TransportError
from llm_allreduce_plugin.group.multicast import layout_of
from llm_allreduce_plugin.transport.mapped import bytes_at
from llm_allreduce_plugin.transport.multicast import Multicast, MulticastMemory, Opening
from llm_allreduce_plugin.transport.multicast_driver import MulticastDriver
from llm_allreduce_plugin.transport.multicast_probe import probe

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

# For each phase of the driver's sequence. A rank that needs longer is left out, and so all go without.
PHASE_WAIT_S = 30.0
# Waits of calls that are compared, of a phase's time: each of the two calls of a step waits twice at most, and must
# have given up before the step does.
WAITS_OF_A_PHASE = 5
# What is compared before anything else goes by multicast: a call of whole vectors, and one that ends within one.
PROVED_COUNTS = (1 << 20, 12_345)
# The same of sums in the switch: elements, and rounds; in several, flags and inputs are used again.
SUMMED = ((1 << 20, 1), (12_345, 1), (12_345, 3))


def _open_driver(device: torch.device) -> MulticastDriver:
    torch.cuda.synchronize(device)  # torch makes the context that the driver's calls then share
    return MulticastDriver(device.index)


def _prepare(address: int, size: int, device: torch.device) -> None:
    """The marker in every word, which the first call relies on."""
    marker = _C.IN_BAND_MARKER - (1 << 32)  # as a signed word
    bytes_at(address, size, device).view(torch.int32).fill_(marker)
    torch.cuda.synchronize(device)


def open_multicast(
    agreement: Agreement,
    device: torch.device,
    config: AllReduceConfig,
    facts: GroupFacts,
    workspace: _C.Workspace,
    another: Callable[[float], _C.Workspace],
) -> tuple[MulticastMemory | None, GroupFacts]:
    """Multicast memory that has been proved and that ``workspace`` uses, if ``facts`` speak of any. Collective.

    Args:
        agreement: of all ranks.
        device: of this one.
        config: settings.
        facts: as if nothing failed.
        workspace: what is to use it.
        another: makes one on the same memory whose waits last so many seconds. Nothing else runs meanwhile.

    Returns:
        It and the facts; or None and facts without it, with the reason, on every rank alike.

    Raises:
        StartTimeoutError, StartError: a rank is gone; or, on every rank alike, a call by multicast has not ended on
            one, which cannot use its GPU any more.
    """
    if not facts.multicast.results:
        if config.multicast is MulticastChoice.ON and agreement.rank == 0:
            logger.warning("multicast is on, but not used: %s", facts.no_multicast_reason)
        return None, facts
    steps = agreement.nested(min(PHASE_WAIT_S, agreement.wait_s), agreement.setting, "at the start of multicast")
    layout = layout_of(config, facts.world_size)
    made: Multicast | None = None
    trial: _C.Workspace | None = None

    try:
        made = Opening(
            steps,
            lambda: _open_driver(device),
            layout.total_bytes,
            lambda address: _prepare(address, layout.total_bytes, device),
        ).open()
        nonce = steps.from_first_rank(
            lambda: int.from_bytes(os.urandom(4), "little"), "to draw a number", TransportError
        )
        probe(steps, made, nonce)
        trial = _on_every_rank(
            steps,
            lambda: another(steps.wait_s / WAITS_OF_A_PHASE),
            "to set up a workspace for calls by multicast",
        )
        trial.set_multicast(made.all, made.own, layout)
        _compare(steps, device, config, facts, trial)
    except BaseException as error:
        if made is not None:
            let_go(made, trial, in_use=steps.abandoned)
        if not isinstance(error, TransportError):
            agreement.abandoned |= steps.abandoned
            raise
        level = logging.WARNING if config.multicast is MulticastChoice.ON else logging.INFO
        if agreement.rank == 0:
            logger.log(level, "all-reduces go without multicast: %s", error)
        return None, facts.without_multicast(str(error))
    finally:
        steps.close()
    workspace.set_multicast(made.all, made.own, layout)
    if agreement.rank == 0:
        logger.info("multicast takes %g MiB of each GPU", made.size / (1 << 20))
    return MulticastMemory(made, device), facts


def _on_every_rank(steps: Agreement, make: Callable[[], _T], step: str) -> _T:
    """``make()``, if it works on every rank. Collective.

    Where it fails on one, it is still waited for on all: what is left on its way would keep the memory for ever.

    Raises:
        TransportError: on every rank alike, with what the lowest failing rank raised.
    """

    def run() -> tuple[list[_T], str | None]:
        try:
            return [make()], None
        except Exception as error:  # noqa: BLE001  (whatever it is, the other ranks must hear of it)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return [], f"rank {steps.rank} cannot use multicast: {reason}"

    made, fault = steps.on_every_rank(run, step, TransportError, "cannot use multicast", may_block=True)
    first = steps.first_fault(fault, f"{step}, at the end")
    if first is not None:
        raise TransportError(first)
    return made[0]


_AFTER_A_LOSS = "Nothing more can run there, with multicast or without: set multicast to off and start again"


class _GpuLostError(Exception):
    """A rank is not back from calls, or cannot make any more."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call that is made twice: pushed, and by multicast.

    Attributes:
        what: the strategy and how its bytes go, in words; ``size``: how much it is, in words.
        launches: pushed, and by multicast.
        in_any_order: its inputs have one sum, in whatever order and precision the switch adds.
    """

    what: tuple[AllReduceStrategy, str]
    count: int
    launches: tuple[Launch, Launch]
    size: str
    in_any_order: bool = False

    def __str__(self) -> str:
        name, how = self.what
        return f"{name} of {self.size} {how}"


def _calls(config: AllReduceConfig, facts: GroupFacts) -> Iterator[_Call]:
    """What is compared, of all that goes by multicast with these settings. Pure."""

    def launches(strategy: KernelStrategy, count: int, *, in_switch: bool) -> tuple[Launch, Launch]:
        asked = config.model_copy(update={"allreduce_strategy": strategy.name, "in_switch_sum": in_switch})
        message = Message(count, "bfloat16", 2)
        return strategy.plan(asked, facts.without_multicast(), message), strategy.plan(asked, facts, message)

    for strategy in (OneShot(), TwoShot()):
        for count in PROVED_COUNTS:
            what = strategy.name, "by multicast"
            yield _Call(what, count, launches(strategy, count, in_switch=False), f"{count} elements")
    if not facts.multicast.inputs:
        return
    for count, rounds in SUMMED:
        pushed, summed = launches(TwoShot(), count, in_switch=True)
        chunk = math.ceil(summed.chunk_vectors / rounds)
        what = TwoShot.name, "summed in the switch"
        size = f"{count} elements" + (f" in {rounds} rounds" if rounds > 1 else "")
        vectors = Message(count, "bfloat16", 2).vectors
        cut = dataclasses.replace(summed, chunk_vectors=chunk, rounds=math.ceil(vectors / (chunk * facts.world_size)))
        yield _Call(what, count, (pushed, cut), size, in_any_order=True)


def _compare(
    steps: Agreement, device: torch.device, config: AllReduceConfig, facts: GroupFacts, workspace: _C.Workspace
) -> None:
    """Whole calls by multicast against calls that push, bit for bit. Collective.

    Raises:
        TransportError: on every rank alike, naming what differs or cannot be called.
        StartError: on every rank alike, naming one that cannot use its GPU any more.
    """
    # What may fail on one rank alone comes before any rank launches: peers would wait for it until they have no GPU.
    trials = _on_every_rank(
        steps,
        lambda: [_Trial(steps.rank, device, workspace, call) for call in _calls(config, facts)],
        "to prepare calls by multicast",
    )
    for trial in trials:
        call = trial.call
        step = f"to compare {call}"
        try:
            fault = steps.on_every_rank(
                lambda trial=trial: _fault_of(trial, workspace),  # type: ignore[misc]
                step,
                _GpuLostError,
                f"has lost its GPU in {call}",
                may_block=True,
            )
        except _GpuLostError as error:
            steps.abandoned = True  # what peers have begun may still store to what is mapped here
            text = f"{error}. {_AFTER_A_LOSS}"
            raise StartError(text) from error
        # Only now: all ranks are back. What stopped them at once would leave peers on the way.
        first = steps.first_fault(
            None if fault is None else f"rank {steps.rank} cannot use multicast: {fault}", f"{step}, at the end"
        )
        if first is not None:
            raise TransportError(first)


def _input(rank: int, call: _Call) -> torch.Tensor:
    """What this rank gives."""
    generator = torch.Generator().manual_seed(rank + 1)
    if call.in_any_order:
        return torch.randint(-1, 2, (call.count,), generator=generator).to(torch.bfloat16)
    return torch.randn(call.count, generator=generator).to(torch.bfloat16)


class _Trial:
    """A call that can be made both ways: all of it that may fail on one rank alone has been done.

    Raises:
        RuntimeError: there is no memory, or the GPU does not answer.
    """

    def __init__(self, rank: int, device: torch.device, workspace: _C.Workspace, call: _Call) -> None:
        self.call, self.device = call, device
        with torch.cuda.device(device):
            self._input = _input(rank, call).to(device)
            self._outputs = [torch.full_like(self._input, float("nan")) for _ in call.launches]
        self._plans = [
            _C.Plan(
                workspace,
                algorithm=int(launch.algorithm),
                exchange=int(launch.exchange),
                count=call.count,
                dtype=DTYPE_CODES["bfloat16"],
                lanes=launch.lanes,
                threads=launch.threads,
                chunk_vectors=launch.chunk_vectors,
                scatter_lanes=launch.scatter_lanes,
                drain_lanes=launch.drain_lanes,
            )
            for launch in call.launches
        ]
        torch.cuda.synchronize(device)

    def differing(self) -> int:
        """In how many elements the results of the two launches differ.

        Raises:
            RuntimeError: one cannot be made, or has failed.
        """
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            for plan, output in zip(self._plans, self._outputs, strict=True):
                if (status := plan(self._input.data_ptr(), output.data_ptr(), stream.cuda_stream)) != 0:
                    raise RuntimeError(_C.error_string(status))
            stream.synchronize()
            pushed, by_multicast = (output.view(torch.int16) for output in self._outputs)
            return int((pushed != by_multicast).sum())


def _fault_of(trial: _Trial, workspace: _C.Workspace) -> str | None:
    """What is wrong with a call by multicast; None: nothing.

    Raises:
        RuntimeError: the GPU can be used no more.
    """
    call = trial.call
    fault: str | None
    try:
        differing = trial.differing()
        fault = f"{' '.join(call.what)} differs in {differing} of {call.size}" if differing else None
    except Exception as error:  # noqa: BLE001  (whatever it is: what counts is whether the GPU can go on)
        fault = f"{call}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        logger.warning("cannot compare calls by multicast: %s", fault)
    try:
        torch.cuda.synchronize(trial.device)  # what has ended a context is told again by every call
    except RuntimeError as error:
        if (failure := workspace.failure()) is None:
            raise
        message = f"it waited {failure[-1]:.3g} s in vain for what rank {failure[1]} stores"
        raise RuntimeError(message) from error
    return fault
