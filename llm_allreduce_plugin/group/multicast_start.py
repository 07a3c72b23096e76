"""The start of multicast in a group: opened, proved, compared. Where any of it fails, all goes on without.

But for one thing: a call whose stores do not arrive ends as every expired wait does, and no kernel runs in that process
any more. Nothing can go on there; the start fails on all ranks, and says what to set.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.base import Message
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
from llm_allreduce_plugin.transport.multicast import Multicast, Opening
from llm_allreduce_plugin.transport.multicast_driver import MulticastDriver
from llm_allreduce_plugin.transport.multicast_probe import probe

logger = logging.getLogger(__name__)

# For each phase of the driver's sequence. A rank that needs longer is left out, and so all go without.
PHASE_WAIT_S = 30.0
# Waits of calls that are compared, of a phase's time: each of the two calls of a step waits twice at most, and must
# have given up before the step does.
WAITS_OF_A_PHASE = 5
# What is compared before anything else goes by multicast: a call of whole vectors, and one that ends within one.
PROVED_COUNTS = (1 << 20, 12_345)


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
) -> tuple[Multicast | None, GroupFacts]:
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
        trial = steps.on_every_rank(
            lambda: another(steps.wait_s / WAITS_OF_A_PHASE),
            "to set up a workspace for calls by multicast", TransportError, "cannot use multicast", may_block=True,
        )  # fmt: skip
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
    return made, facts


_AFTER_A_LOSS = "Nothing more can run there, with multicast or without: set multicast to off and start again"


class _GpuLostError(Exception):
    """A rank is not back from calls, or cannot make any more."""


def _compare(
    steps: Agreement, device: torch.device, config: AllReduceConfig, facts: GroupFacts, workspace: _C.Workspace
) -> None:
    """Whole calls by multicast against calls that push, bit for bit. Collective.

    Raises:
        TransportError: on every rank alike, naming what differs or cannot be called.
        StartError: on every rank alike, naming one that cannot use its GPU any more.
    """
    exact = config.model_copy(update={"in_switch_sum": False})
    for strategy in (OneShot(), TwoShot()):
        asked = exact.model_copy(update={"allreduce_strategy": strategy.name})
        for count in PROVED_COUNTS:
            message = Message(count, "bfloat16", 2)
            launches = [strategy.plan(asked, known, message) for known in (facts.without_multicast(), facts)]
            what = f"{strategy.name} of {count} elements by multicast"
            step = f"to compare {what}"
            try:
                fault = steps.on_every_rank(
                    lambda launches=launches, count=count, name=strategy.name: _fault_of(  # type: ignore[misc]
                        steps.rank, device, workspace, launches, count, name
                    ),
                    step,
                    _GpuLostError,
                    f"has lost its GPU in {what}",
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


def _fault_of(
    rank: int,
    device: torch.device,
    workspace: _C.Workspace,
    launches: list[Launch],
    count: int,
    name: AllReduceStrategy,
) -> str | None:
    """What is wrong with calls by multicast; None: nothing.

    Raises:
        RuntimeError: the GPU can be used no more.
    """
    fault: str | None
    try:
        differing = _differing(rank, device, workspace, launches, count)
        fault = f"{name} by multicast differs in {differing} of {count} elements" if differing else None
    except Exception as error:  # noqa: BLE001  (whatever it is: what counts is whether the GPU can go on)
        fault = f"{name} of {count} elements: {(str(error).splitlines() or [type(error).__name__])[0]}"
        logger.warning("cannot compare calls by multicast: %s", fault)
    try:
        torch.cuda.synchronize(device)  # what has ended a context is told again by every call
    except RuntimeError as error:
        if (failure := workspace.failure()) is None:
            raise
        message = f"it waited {failure[-1]:.3g} s in vain for what rank {failure[1]} stores"
        raise RuntimeError(message) from error
    return fault


def _differing(rank: int, device: torch.device, workspace: _C.Workspace, launches: list[Launch], count: int) -> int:
    """In how many elements the results of two launches differ.

    Raises:
        RuntimeError: one cannot be made, or has failed.
    """
    with torch.cuda.device(device):
        generator = torch.Generator().manual_seed(rank + 1)
        input_ = torch.randn(count, generator=generator).to(torch.bfloat16).to(device)
        outputs = [torch.full_like(input_, float("nan")) for _ in launches]
        stream = torch.cuda.current_stream(device)
        for launch, output in zip(launches, outputs, strict=True):
            plan = _C.Plan(
                workspace,
                algorithm=int(launch.algorithm),
                exchange=int(launch.exchange),
                count=count,
                dtype=DTYPE_CODES["bfloat16"],
                lanes=launch.lanes,
                threads=launch.threads,
                chunk_vectors=launch.chunk_vectors,
                scatter_lanes=launch.scatter_lanes,
                drain_lanes=launch.drain_lanes,
            )
            if (status := plan(input_.data_ptr(), output.data_ptr(), stream.cuda_stream)) != 0:
                raise RuntimeError(_C.error_string(status))
        stream.synchronize()
        return int((outputs[0].view(torch.int16) != outputs[1].view(torch.int16)).sum())
