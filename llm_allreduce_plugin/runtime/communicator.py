"""TensorParallelCommunicator: the one object that an engine holds."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Decision, Exchange
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.base.cleanup import Ending, keep_for_ever
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.group.start import log_start, open_group
from llm_allreduce_plugin.runtime import metrics, reports
from llm_allreduce_plugin.runtime.calls import Call, kernel_call, plan_of, torch_all_reduce
from llm_allreduce_plugin.runtime.checked_calls import CallChecker, Description
from llm_allreduce_plugin.runtime.checked_calls import describe as describe_one
from llm_allreduce_plugin.runtime.health import Health
from llm_allreduce_plugin.runtime.monitor import Monitor
from llm_allreduce_plugin.runtime.plans import Planned, Plans
from llm_allreduce_plugin.runtime.tally import MOST_FALLBACKS, CountedCall, Tally, fallback_of
from llm_allreduce_plugin.selection.policy import decide, describe
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport import SharedMemory
from llm_allreduce_plugin.transport.peer_visible import PeerVisibleBuffer

logger = logging.getLogger(__name__)

_LEAVE_WAIT_S = 1.0  # for a call to leave its wait
_CONTEXT_ENDS_S = 10.0  # for the driver to end a context after a wait has expired; 5 s were seen
_MONITOR_WAIT_S = 8.0  # for the last report, on whatever file system
_NOT_PLANNED: Any = object()


def dtype_name(dtype: torch.dtype) -> str:
    """As the policy spells it: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


class TensorParallelCommunicator:
    """All-reduces of one tensor-parallel group.

    Construction is collective: every rank of ``group`` must take part, with the same settings. Calls are collective too
    and must come in the same order on every rank.

    Args:
        group: the tensor-parallel process group. On GPUs its NCCL group; symmetric memory is set up on it.
        device: this rank's device.
        config: the settings; defaults to :func:`llm_allreduce_plugin.load_config`.
        control_group: a group of the same ranks, through whose store they agree; defaults to ``group``.
        fallback: runs what no kernel here can: takes a tensor, returns its all-reduced sum without touching the input.
            Defaults to ``torch.distributed.all_reduce`` on a copy.
        name: what the engine calls the group, for reports: ``"dp1"``.

    Raises:
        ConfigError: a setting is wrong.
        RankMismatchError: ranks disagree about a setting or a capability.
        StartTimeoutError: a rank did not come to a step of the start within ``start_timeout_s``.
        StartError: a rank has failed at the start, or the store of the control group is gone.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        config: AllReduceConfig | None = None,
        *,
        control_group: dist.ProcessGroup | None = None,
        fallback: Call | None = None,
        name: str = "",
    ) -> None:
        if config is None:
            from llm_allreduce_plugin.config import load_config

            config = load_config()
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.config = config
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        # No bound methods of this object here or in the plans: without a cycle, an abandoned communicator ends where it
        # is dropped, and not wherever garbage happens to be collected.
        self._fallback = fallback or torch_all_reduce(group)
        self._memory: SharedMemory | None = None
        self._workspace: _C.Workspace | None = None
        self._plans: Plans[tuple[int, torch.dtype]] = Plans()
        self._tally = Tally()
        self._peer_visible: list[PeerVisibleBuffer] = []
        self._pulls: Plans[tuple[int, int, torch.dtype]] = Plans()
        self._logged: set[str] = set()
        self._closed = False

        self._control_group = control_group or group
        agreement = Agreement(self._control_group, config.start_timeout_s)
        try:
            opened = open_group(agreement, group, self.device, config)
        except BaseException as error:
            agreement.give_up(error)
            raise
        finally:
            agreement.close()
        self.facts = opened.facts
        self._identity = reports.Identity(self.rank, dist.get_process_group_ranks(group), name, opened.first_member)
        self._memory, self._workspace = opened.memory, opened.workspace
        self._board, self._board_memory = opened.board, opened.board_memory
        self._health = None if opened.workspace is None else Health(opened.workspace, opened.board)
        self._checker = (
            CallChecker(self._control_group, config.timeout_s, config.first_timeout_s) if config.check_calls else None
        )
        self._sizes = describe(config, self.facts)
        if self.rank == 0:
            log_start(config, self.facts, self._sizes)
            # Says at once what asking for a strategy without a kernel leads to.
            decision = decide(config, self.facts, 1, "bfloat16")
            if self.facts.transport is not Transport.NONE and decision.is_fallback:
                self._log_fallback(decision)
        self._monitor: Monitor | None = None
        counters = metrics.RankCounters.if_wanted()
        if self._workspace is not None or config.report_dir is not None or counters is not None:
            this = weakref.ref(self)  # the threads must not keep an abandoned communicator alive
            self._monitor = Monitor(
                self._workspace,
                config.report_dir,
                lambda: owner.report() if (owner := this()) else None,
                counters,
                alive=lambda: this() is not None,
                board=self._board,
                watchers=() if self._health is None else (self._health.look,),
            )

    # -- calls ---------------------------------------------------------------------------------------------------------

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum of ``input_`` over all ranks.

        Args:
            input_: any shape, dtype and layout, on this communicator's device; the same shape and dtype on every
                rank. Never written.

        Returns:
            A fresh tensor like ``input_`` (shape, dtype, strides), bit-identical on every rank.

        Raises:
            ValueError: ``input_`` is on another device.
            PeerTimeoutError: a peer did not arrive within ``timeout_s``, in this call (CPU) or an earlier one (GPU).
            RuntimeError: the communicator is closed, or CUDA failed.
        """
        if input_.device != self.device:
            message = f"input is on {input_.device}, this communicator on {self.device}"
            raise ValueError(message)
        if self._peer_visible and (call := self._pull(input_)) is not None:
            return call(input_)
        key = (input_.numel(), input_.dtype)
        entry = self._plans.get(key)
        if entry is None:
            entry = self._plan(*key)
        return entry[1](input_)

    def peer_visible_empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in memory that every peer can read: calls that would be two-shot read their input there in place.

        Collective: every rank must ask for the same, and must pass tensors at the same place in it to a call. It lives
        as long as the communicator. Anything may be written to it, before a call and after, as to any tensor.

        Args:
            shape: of the tensor.
            dtype: of its elements.

        Returns:
            An uninitialized tensor; where ranks do not share GPU memory, an ordinary one.

        Raises:
            TransportError: the memory cannot be allocated or mapped.
        """
        size = max(1, math.prod(shape)) * dtype.itemsize
        if self.facts.transport is not Transport.SYMMETRIC or not self.facts.in_band.two_shot:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        agreement = Agreement(self._control_group, self.config.start_timeout_s, when="for memory that peers see")
        try:
            buffer = PeerVisibleBuffer.open(agreement, self._group, self.device, size)
        finally:
            agreement.close()
        self._peer_visible.append(buffer)
        return buffer.storage[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))

    def explain(self, shape: Sequence[int], dtype: torch.dtype, *, readable_in_place: bool = False) -> Decision:
        """What :meth:`all_reduce` does with a tensor of this shape and dtype, and why. Pure: runs nothing.

        ``readable_in_place``: it lies in memory of :meth:`peer_visible_empty`, from a multiple of 16 bytes on.
        """
        count, name = math.prod(shape), dtype_name(dtype)
        return decide(self.config, self.facts, count, name, readable_in_place=readable_in_place)

    def call_of(self, strategy: str, count: int, dtype: torch.dtype) -> Call:
        """The call that another strategy would make with messages of this size: what tuning compares.

        Collective, like the calls themselves. Strategies share this communicator's workspace.

        Raises:
            RuntimeError: the strategy cannot run here, with the reason.
        """
        settings = self.config.model_copy(update={"allreduce_strategy": AllReduceStrategy.parse(strategy)})
        decision = decide(settings, self.facts, count, dtype_name(dtype))
        if decision.launch is None or decision.runs_another:
            raise RuntimeError(decision.reason)
        return self._kernel_call(decision, count, dtype).call

    def report(self) -> dict[str, Any]:
        """What this rank has done so far, ready for JSON.

        ``calls`` counts eager calls per strategy. ``captured`` counts calls recorded into CUDA graphs: their replays
        do not pass through Python and are not counted. ``fallbacks`` has the reasons, ``fallback_calls`` the calls of
        both kinds for each of them.
        """
        counts = self._tally.counts()
        reasons: dict[str, list[str]] = {}
        for fallback in counts.fallbacks:
            reasons.setdefault(f"{fallback.requested} -> {fallback.strategy}", []).append(fallback.reason)
        return {
            **self._identity.fields(),
            "device": str(self.device),
            "transport": str(self.facts.transport),
            "allreduce_strategy": str(self.config.allreduce_strategy),
            "sizes": self._sizes,
            "closed": self._closed,
            "calls": dict(+counts.calls),
            "captured": dict(+counts.captured),
            "fallbacks": {what: "; ".join(known) for what, known in reasons.items()},
            "fallback_calls": [{**found._asdict(), "calls": calls} for found, calls in counts.fallbacks.items()],
        }

    def check(self) -> None:
        """Raise the error of an earlier call that the device could not raise itself.

        Raises:
            PeerTimeoutError: a wait has expired.
        """
        if self._health is not None:
            self._health.raise_error()

    def close(self) -> None:
        """Let go of everything, in an order that suits a group in which something is wrong, and in bounded time.

        No call begins any more; CPU ranks that wait in one leave it. What runs on the GPU is waited for, for
        ``timeout_s``. Then come the summary, the last report, and the end of the memory, unless something still runs
        on it. Idempotent.

        Raises:
            PeerTimeoutError: a wait had expired of which the caller has not heard yet. All else has been done.
            RuntimeError: the same of what CUDA said, or of another step.
        """
        if self._closed:
            return
        self._closed = True
        ending, health = Ending(), self._health
        is_quiet = self._end_calls(ending)
        is_broken = bool(ending.errors)
        broken = health.error() if health is not None and not self._was_left() else None
        if broken is not None and health is not None:
            is_broken = True
            for error in ending.errors:  # what follows from the expired wait
                logger.debug("after the failure: %s", error)
            # Who has heard of it in a call need not hear of it again.
            ending.errors = [] if health.told else [broken]
            ending.step(health.look, "tell peers")
            health.told = True
        ending.step(self._tally.end, "count calls")
        if self.rank == 0:
            ending.step(lambda: logger.info("all-reduce summary: %s", self._tally.counts()), "log the summary")
        if self._monitor is not None:
            ending.step(self._monitor.close, "end the monitor", _MONITOR_WAIT_S)
        self._free(ending, is_quiet=is_quiet, is_broken=is_broken)
        ending.raise_first()

    def _was_left(self) -> bool:
        """Whether all that is wrong is that closing has ended a call of another thread."""
        workspace = self._workspace
        return workspace is not None and workspace.failure() is not None and workspace.reason() == _C.REASON_INTERRUPTED

    def _end_calls(self, ending: Ending) -> bool:
        """No call begins from now on; whether none is under way any more."""
        workspace, device = self._workspace, self.device
        if self._checker is not None:
            ending.step(self._checker.close, "end the comparison of calls")
        if workspace is None:
            return True
        left: list[bool] = []
        ending.step(lambda: left.append(workspace.close(_LEAVE_WAIT_S)), "stop taking calls")
        is_quiet = left == [True]
        if device.type == "cuda":
            # A context that an expired wait has ended, or that hangs, must not hold what follows.
            is_quiet &= ending.step(
                lambda: torch.cuda.synchronize(device),
                f"wait for {device}",
                self.config.timeout_s + _LEAVE_WAIT_S,
                lambda: 0.0 if workspace.failure() is None else _CONTEXT_ENDS_S,
            )
        return is_quiet

    def _free(self, ending: Ending, *, is_quiet: bool, is_broken: bool) -> None:
        """The end of all memory."""
        self._plans.clear()
        self._pulls.clear()
        held = [self._memory, self._workspace, *self._peer_visible]
        if not is_quiet:
            logger.warning("an all-reduce may still be under way: its memory is kept until this process ends")
            keep_for_ever(*held)
        elif is_broken and self.facts.transport is Transport.SYMMETRIC:
            # torch frees it with calls that end the process where the context has ended before.
            logger.info("the GPU memory of this group is let go when this process ends: its CUDA context has failed")
            keep_for_ever(*held)
        elif self._memory is not None:
            memory = self._memory
            self._peer_visible.clear()
            ending.step(memory.close, "let go of the workspace's memory")
        del held
        if self._board is not None:
            ending.step(self._board.close, "leave the board")
        if self._board_memory is not None:
            ending.step(self._board_memory.close, "let go of the board's memory")
        self._peer_visible.clear()
        self._memory = self._workspace = self._board = self._board_memory = self._health = None

    # -- what runs -----------------------------------------------------------------------------------------------------

    def _decide(self, count: int, dtype: torch.dtype, *, readable_in_place: bool = False) -> Decision:
        if self._closed:
            message = "this communicator is closed"
            raise RuntimeError(message)
        decision = decide(self.config, self.facts, count, dtype_name(dtype), readable_in_place=readable_in_place)
        if fallback_of(decision) is not None:
            self._log_fallback(decision)
        return decision

    def _plan(self, count: int, dtype: torch.dtype) -> Planned:
        decision = self._decide(count, dtype)
        is_ours = decision.launch is not None
        planned = self._kernel_call(decision, count, dtype) if is_ours else self._engine_call(decision)
        planned = self._checked(planned, count, dtype)
        self._plans.keep((count, dtype), planned)
        return planned

    def _engine_call(self, decision: Decision) -> Planned:
        """A function that runs what no kernel here can."""
        capturing = torch.cuda.is_current_stream_capturing if self.device.type == "cuda" else bool
        call = CountedCall(self._fallback, capturing)
        self._tally.add(decision, call.made, call)
        return Planned(decision, call, call.made)

    def _log_fallback(self, decision: Decision) -> None:
        line = f"{decision.requested} falls back to {decision.strategy}: {decision.reason}"
        if self.rank == 0 and line not in self._logged and len(self._logged) < MOST_FALLBACKS:
            self._logged.add(line)
            logger.warning("%s", line)

    def _pull(self, input_: torch.Tensor) -> Call | None:
        """The call for an input that peers read in place; None where it lies elsewhere, or is sent all the same."""
        found = next((i for i, buffer in enumerate(self._peer_visible) if buffer.holds(input_)), None)
        if found is None:
            return None
        key = (found, input_.numel(), input_.dtype)
        if (planned := self._pulls.get(key, _NOT_PLANNED)) is _NOT_PLANNED:
            planned = self._plan_pull(*key)
            self._pulls.keep(key, planned)
        return None if planned is None else planned.call

    def _plan_pull(self, found: int, count: int, dtype: torch.dtype) -> Planned | None:
        """For inputs in one of the buffers that peers see; None where they are sent as from anywhere else."""
        decision = self._decide(count, dtype, readable_in_place=True)
        if decision.launch is None or decision.launch.exchange is not Exchange.PULL:
            return None
        planned = self._kernel_call(decision, count, dtype, self._peer_visible[found].peer_distances)
        return self._checked(planned, count, dtype, f" in memory {found} that peers see")

    def _kernel_call(
        self, decision: Decision, count: int, dtype: torch.dtype, peer_distances: Sequence[int] = ()
    ) -> Planned:
        """A function that launches this decision, with all that does not change bound."""
        launch, workspace, health = decision.launch, self._workspace, self._health
        assert workspace is not None
        assert health is not None
        assert launch is not None
        plan = plan_of(workspace, launch, count, dtype, peer_distances)
        call = kernel_call(plan, launch, health, self.device, str(decision.strategy))
        self._tally.add(decision, plan, call)
        return Planned(decision, call, plan)

    def _checked(self, planned: Planned, count: int, dtype: torch.dtype, place: str = "") -> Planned:
        """The same, compared between ranks first where that is asked for."""
        if self._checker is None:
            return planned
        decision = planned.decision

        def describe_call(captured: bool) -> Description:  # noqa: FBT001
            return describe_one(decision, count, dtype_name(dtype), place, captured=captured)

        on_gpu = self.device.type == "cuda"
        return planned._replace(call=self._checker.around(planned.call, describe_call, on_gpu=on_gpu))
