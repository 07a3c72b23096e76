"""What a decision becomes: calls that are planned once for each size and type, a bounded number of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Decision, Exchange, FusedDecision, Launch
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.runtime import norm_calls
from llm_allreduce_plugin.runtime.calls import Call, kernel_call, plan_of
from llm_allreduce_plugin.runtime.checked_calls import CallChecker, Description, describe_fused
from llm_allreduce_plugin.runtime.checked_calls import describe as describe_one
from llm_allreduce_plugin.runtime.eager_calls import EagerCalls
from llm_allreduce_plugin.runtime.health import Health
from llm_allreduce_plugin.runtime.network_calls import Between, Shape, network_call
from llm_allreduce_plugin.runtime.norm_calls import NormCall, NormShape
from llm_allreduce_plugin.runtime.placed_calls import CallInto, copied_into, kernel_call_into, placing_call
from llm_allreduce_plugin.runtime.plans import Planned, Plans
from llm_allreduce_plugin.runtime.tally import MOST_FALLBACKS, Counted, CountedCall, Tally, fallback_of
from llm_allreduce_plugin.selection.policy import decide, decide_fused
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.peer_visible import PeerVisibleBuffer
from llm_allreduce_plugin.transport.registered import RegisteredPool

logger = logging.getLogger(__name__)

_NOT_PLANNED: Any = object()
_Made = TypeVar("_Made", Call, CallInto)


def dtype_name(dtype: torch.dtype) -> str:
    """As the policy spells it: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


class Planner:
    """Of one communicator.

    Args:
        config: the settings.
        facts: of the group.
        rank: this one; the first one logs.
        device: this rank's.
        fallback: runs what no kernel here can.
        workspace: of this rank; None: the group shares no memory.
        checker: compares calls between ranks first; None: nobody does.
        health: of the group; None where there is no workspace.
        between: what joins this rank to other hosts; None: all run on one.
        pool: registered memory; None: there is none.

    Attributes:
        plans: by count and type of the message.
        eager_call: the sum of a message by one of them, in one step; None where that is not to be had.
        pulls: of inputs that peers read in place; by number of the buffer, count and type.
        into: of messages with an output of the caller's; by count, type and whether that lies in registered memory.
        normed: of messages with residual and norm behind them.
        buffers: memory that peers see.
        tally: of all calls that are planned here.
    """

    def __init__(
        self,
        config: AllReduceConfig,
        facts: GroupFacts,
        rank: int,
        device: torch.device,
        fallback: Call,
        *,
        workspace: _C.Workspace | None,
        health: Health | None,
        checker: CallChecker | None,
        between: Between | None = None,
        pool: RegisteredPool | None = None,
    ) -> None:
        self._config = config
        self._facts = facts
        self._rank = rank
        self._device = device
        self._fallback = fallback
        self._workspace = workspace
        self._health = health
        self._checker = checker
        self._between = between
        self._pool = pool
        self._capturing = torch.cuda.is_current_stream_capturing if device.type == "cuda" else bool
        self._logged: set[str] = set()
        self._closed = False
        self._eager = EagerCalls(device)
        self.eager_call = self._eager.call
        self.plans: Plans[tuple[int, torch.dtype], Call] = Plans(gone=self._eager.forget)
        self.pulls: Plans[tuple[int, int, torch.dtype], Call] = Plans()
        self.into: Plans[tuple[int, torch.dtype, bool], CallInto] = Plans()
        self.normed: Plans[NormShape, NormCall] = Plans()
        self.buffers: list[PeerVisibleBuffer] = []
        self.tally = Tally()

    def stop(self) -> None:
        """Nothing is planned any more."""
        self._closed = True

    def forget(self) -> None:
        """Let go of all plans, and of the workspace."""
        self._eager.clear()
        self.plans.clear()
        self.pulls.clear()
        self.into.clear()
        self.normed.clear()
        self._workspace = self._health = self._between = self._pool = None

    def log_missing_kernel(self) -> None:
        """Say at once what asking for a strategy that cannot run leads to."""
        decision = decide(self._config, self._facts, 1, "bfloat16")
        if self._facts.transport is not Transport.NONE and decision.is_fallback:
            self._log_fallback(decision)

    def _settings_of(self, strategy: str, **others: object) -> AllReduceConfig:
        """Those of another strategy, over the registered memory that there is, whatever it would ask for."""
        registered = 0 if self._pool is None else self._pool.size
        changes = {"allreduce_strategy": AllReduceStrategy.parse(strategy), "registered_pool": registered, **others}
        return self._config.model_copy(update=changes)

    def call_of(self, strategy: str, count: int, dtype: torch.dtype) -> Call:
        """The call that another strategy would make.

        Raises:
            RuntimeError: the strategy cannot run here, with the reason; or the communicator is closed.
        """
        self.check_open()
        decision = decide(self._settings_of(strategy), self._facts, count, dtype_name(dtype))
        if decision.launch is None or decision.runs_another:
            raise RuntimeError(decision.reason)
        planned, eager = self._kernel_call(decision, count, dtype), EagerCalls(self._device)
        self._keep_eager(eager, planned, decision, count, dtype)
        return eager.around(planned.call)

    def check_open(self) -> None:
        """Raise an error once nothing is planned any more.

        Raises:
            RuntimeError: the communicator is closed.
        """
        if self._closed:
            message = "this communicator is closed"
            raise RuntimeError(message)

    def _decide(
        self, count: int, dtype: torch.dtype, *, readable_in_place: bool = False, registered_output: bool | None = None
    ) -> Decision:
        self.check_open()
        decision = decide(
            self._config, self._facts, count, dtype_name(dtype),
            readable_in_place=readable_in_place, registered_output=registered_output,
        )  # fmt: skip
        if fallback_of(decision) is not None:
            self._log_fallback(decision)
        return decision

    def plan(self, count: int, dtype: torch.dtype) -> Planned[Call]:
        """What happens to messages of this size and type.

        Raises:
            RuntimeError: the communicator is closed.
        """
        decision = self._decide(count, dtype)
        is_ours = decision.launch is not None
        planned = self._kernel_call(decision, count, dtype) if is_ours else self._engine_call(decision)
        planned = self._checked(planned, decision, count, dtype)
        self.plans.keep((count, dtype), planned)
        if self._checker is None:
            self._keep_eager(self._eager, planned, decision, count, dtype)
        return planned

    def _keep_eager(
        self, eager: EagerCalls, planned: Planned[Call], decision: Decision, count: int, dtype: torch.dtype
    ) -> None:
        """Where it is one kernel and nothing else, from a tensor's address to another's."""
        launch, plan = decision.launch, planned.counted
        if launch is None or not isinstance(plan, _C.Plan):
            return
        if launch.exchange is not Exchange.PLACE and self._health is not None:
            name, aligned = str(decision.strategy), launch.scatter_lanes > 0
            eager.keep(count, dtype, plan, self._health, name, must_be_aligned=aligned)

    def _engine_call(self, decision: Decision) -> Planned[Call]:
        """A function that runs what no kernel here can."""
        call = CountedCall(self._fallback, self._capturing)
        self.tally.add(decision, call.made, call)
        return Planned(decision, call, call.made)

    def _log_fallback(self, decision: Decision) -> None:
        line = f"{decision.requested} falls back to {decision.strategy}: {decision.reason}"
        self._log_once(logging.WARNING, line)

    def _log_once(self, level: int, line: str) -> None:
        if self._rank == 0 and line not in self._logged and len(self._logged) < MOST_FALLBACKS:
            self._logged.add(line)
            logger.log(level, "%s", line)
            if len(self._logged) == MOST_FALLBACKS:
                logger.log(
                    level,
                    "%d lines like these were written; further ones are not, reports count them all",
                    len(self._logged),
                )

    def pull(self, input_: torch.Tensor) -> Call | None:
        """The call for an input that peers read in place; None where it lies elsewhere, or is sent all the same."""
        found = next((i for i, buffer in enumerate(self.buffers) if buffer.holds(input_)), None)
        if found is None:
            return None
        key = (found, input_.numel(), input_.dtype)
        if (planned := self.pulls.get(key, _NOT_PLANNED)) is _NOT_PLANNED:
            planned = self._plan_pull(*key)
            self.pulls.keep(key, planned)
        return None if planned is None else planned.call

    def _plan_pull(self, found: int, count: int, dtype: torch.dtype) -> Planned[Call] | None:
        """For inputs in one of the buffers that peers see; None where they are sent as from anywhere else."""
        decision = self._decide(count, dtype, readable_in_place=True)
        if decision.launch is None or decision.launch.exchange is not Exchange.PULL:
            return None
        planned = self._kernel_call(decision, count, dtype, self.buffers[found].peer_distances)
        return self._checked(planned, decision, count, dtype, f" in memory {found} that peers see")

    def plan_into(self, count: int, dtype: torch.dtype, *, registered: bool) -> Planned[CallInto]:
        """What happens to messages whose output is the caller's. ``registered``: it lies in registered memory.

        Raises:
            RuntimeError: the communicator is closed.
        """
        decision = self._decide(count, dtype, registered_output=registered)
        planned = self._call_into(decision, count, dtype)
        planned = self._checked(planned, decision, count, dtype, " to an output of the caller's")
        self.into.keep((count, dtype, registered), planned)
        return planned

    def call_into_of(self, strategy: str, count: int, dtype: torch.dtype) -> CallInto:
        """The call that another strategy would make into a registered output.

        Raises:
            RuntimeError: the strategy cannot run here, with the reason; or the communicator is closed.
        """
        self.check_open()
        settings = self._settings_of(strategy)
        decision = decide(settings, self._facts, count, dtype_name(dtype), registered_output=True)
        if decision.launch is None or decision.runs_another:
            raise RuntimeError(decision.reason)
        return self._call_into(decision, count, dtype).call

    def _call_into(self, decision: Decision, count: int, dtype: torch.dtype) -> Planned[CallInto]:
        """A function that does it, into an output of the caller's."""
        launch, workspace, health = decision.launch, self._workspace, self._health
        if launch is None or launch.hosts > 1:
            made = self._engine_call(decision) if launch is None else self._kernel_call(decision, count, dtype)
            return Planned(decision, copied_into(made.call), made.counted)
        assert workspace is not None
        assert health is not None
        pools = self._pool.bases if self._pool is not None and launch.exchange is Exchange.PLACE else ()
        plan = plan_of(workspace, launch, count, dtype, pools=pools)
        call = kernel_call_into(plan, launch, health, self._device, str(decision.strategy))
        self.tally.add(decision, plan, call)
        return Planned(decision, call, plan)

    def _kernel_call(
        self, decision: Decision, count: int, dtype: torch.dtype, peer_distances: Sequence[int] = ()
    ) -> Planned[Call]:
        """A function that launches this decision, with all that does not change bound."""
        launch, workspace, health = decision.launch, self._workspace, self._health
        assert workspace is not None
        assert health is not None
        assert launch is not None
        if launch.hosts > 1:
            over_hosts = self._network_call(launch, str(decision.strategy), count, dtype)
            self.tally.add(decision, over_hosts.made, over_hosts)
            return Planned(decision, over_hosts, over_hosts.made)
        if launch.exchange is Exchange.PLACE:
            call, plan = self._placing_call(launch, str(decision.strategy), count, dtype)
        else:
            plan = plan_of(workspace, launch, count, dtype, peer_distances)
            call = kernel_call(plan, launch, health, self._device, str(decision.strategy))
        self.tally.add(decision, plan, call)
        return Planned(decision, call, plan)

    def _placing_call(self, launch: Launch, name: str, count: int, dtype: torch.dtype) -> tuple[Call, _C.Plan]:
        """A function whose results peers store into registered outputs, and what counts its calls."""
        assert self._workspace is not None
        assert self._health is not None
        assert self._pool is not None
        plan = plan_of(self._workspace, launch, count, dtype, pools=self._pool.bases)
        return placing_call(plan, launch, self._health, self._pool, name), plan

    def _network_call(self, launch: Launch, name: str, count: int, dtype: torch.dtype) -> CountedCall:
        """A function that runs a launch over several hosts."""
        assert self._workspace is not None
        assert self._between is not None
        assert self._health is not None
        shape = Shape(launch, count, dtype, self._facts.local_size)
        call = network_call(shape, self._workspace, self._between, self._health, self._device, name)
        return CountedCall(call, self._capturing)

    def _checked(
        self, planned: Planned[_Made], decision: Decision, count: int, dtype: torch.dtype, place: str = ""
    ) -> Planned[_Made]:
        """The same, compared between ranks first where that is asked for."""
        if self._checker is None:
            return planned

        def describe_call(captured: bool) -> Description:  # noqa: FBT001
            return describe_one(decision, count, dtype_name(dtype), place, captured=captured)

        on_gpu = self._device.type == "cuda"
        return planned._replace(call=self._checker.around(planned.call, describe_call, on_gpu=on_gpu))

    # -- with a norm behind them ---------------------------------------------------------------------------------------

    def plan_normed(self, shape: NormShape) -> Planned[NormCall]:
        """What happens to messages with residual and norm behind them.

        Raises:
            RuntimeError: the communicator is closed.
            ValueError: such rows cannot be normed, or not quantized like this.
        """
        self.check_open()
        shape.check()
        decision = decide_fused(
            self._config, self._facts, shape.rows, shape.hidden, dtype_name(shape.dtype), shape.quant
        )
        if fallback_of(decision.all_reduce) is not None:
            self._log_fallback(decision.all_reduce)
        elif decision.launch is None and not decision.by_design:
            self._log_once(logging.INFO, f"norms run in a kernel of their own: {decision.reason}")
        call, counted = self._norm_call(decision, shape)
        if shape.rows:  # without rows nothing runs
            self.tally.add(decision, counted, call)
        if self._checker is not None:

            def describe_call(captured: bool) -> Description:  # noqa: FBT001
                return describe_fused(decision, str(shape), captured=captured)

            call = self._checker.around(call, describe_call, on_gpu=self._device.type == "cuda")
        planned = Planned(decision, call, counted)
        self.normed.keep(shape, planned)
        return planned

    def norm_call_of(self, strategy: str, shape: NormShape, *, fused: bool) -> NormCall:
        """The call that another strategy would make, with the norm in the kernel of the sum or in one of its own.

        Raises:
            RuntimeError: the strategy cannot run here, or its norm not be fused, with the reason; or the communicator
                is closed.
            ValueError: such rows cannot be normed, or not quantized like this.
        """
        self.check_open()
        settings = self._settings_of(strategy, fuse_norm=fused)
        decision = decide_fused(
            settings, self._facts, shape.rows, shape.hidden, dtype_name(shape.dtype), shape.quant, however_slow=True
        )
        if decision.all_reduce.launch is None or decision.all_reduce.runs_another:
            raise RuntimeError(decision.all_reduce.reason)
        if fused and decision.launch is None:
            raise RuntimeError(decision.reason)
        call, counted = self._norm_call(decision, shape)
        self.tally.add(decision, counted, call)
        return call

    def _norm_call(self, decision: FusedDecision, shape: NormShape) -> tuple[NormCall, Counted]:
        """A function that does it, and what counts its calls."""
        name, launch = decision.counted_as, decision.launch or decision.all_reduce.launch
        if shape.rows == 0 or launch is None:
            if shape.rows == 0:
                behind = norm_calls.no_rows(shape)
            elif self._facts.no_norm_reason:
                behind = norm_calls.engine_then_torch(self._fallback, shape)
            else:
                behind = norm_calls.engine_then_norm(self._fallback, shape, self._device)
            call = CountedCall(behind, self._capturing)
            return call, call.made
        assert self._workspace is not None
        assert self._health is not None
        if decision.launch is not None:
            plan = norm_calls.fused_plan(self._workspace, launch, shape)
            return norm_calls.fused_call(plan, shape, self._health, self._device, name), plan
        if launch.hosts > 1:
            over_hosts = self._network_call(launch, name, shape.elements, shape.dtype)
            return norm_calls.engine_then_norm(over_hosts, shape, self._device), over_hosts.made
        if launch.exchange is Exchange.PLACE:
            placed, plan = self._placing_call(launch, name, shape.elements, shape.dtype)
            return norm_calls.engine_then_norm(placed, shape, self._device), plan
        plan = plan_of(self._workspace, launch, shape.elements, shape.dtype)
        return norm_calls.kernel_then_norm(plan, shape, self._health, self._device, name), plan
