"""TensorParallelCommunicator: the one object that an engine holds."""

from __future__ import annotations

import dataclasses
import logging
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C, agreement, metrics
from llm_allreduce_plugin.calls import Call, by_capture, kernel_call, plan_of, raise_failure_of, torch_all_reduce
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, StagedChoice
from llm_allreduce_plugin.errors import ConfigError, TransportError
from llm_allreduce_plugin.memory import SharedMemory
from llm_allreduce_plugin.memory.host import HostMemory
from llm_allreduce_plugin.memory.layouts import refusal_note, transport_obstacle, transports, workspace_layout
from llm_allreduce_plugin.memory.peer_visible import PeerVisibleBuffer
from llm_allreduce_plugin.memory.shm import ShmMemory
from llm_allreduce_plugin.memory.symmetric import SymmetricMemory, prove_peer_access
from llm_allreduce_plugin.monitor import Monitor, failure_of
from llm_allreduce_plugin.selection.decision import Algorithm, Decision
from llm_allreduce_plugin.selection.facts import GroupFacts, Transport
from llm_allreduce_plugin.selection.forms import form_of
from llm_allreduce_plugin.selection.policy import decide, describe, table_of, uses_table
from llm_allreduce_plugin.strategies import STRATEGIES, KernelStrategy, staging
from llm_allreduce_plugin.tally import CountedCall, Tally, fallback_of
from llm_allreduce_plugin.topology import nvlink_gap, p2p_obstacle

logger = logging.getLogger(__name__)


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
        control_group: a group of the same ranks that carries Python objects at start (gloo); defaults to ``group``.
        fallback: runs what no kernel here can: takes a tensor, returns its all-reduced sum without touching the input.
            Defaults to ``torch.distributed.all_reduce`` on a copy.

    Raises:
        ConfigError: a setting is wrong.
        RankMismatchError: ranks disagree about a setting or a capability.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        config: AllReduceConfig | None = None,
        *,
        control_group: dist.ProcessGroup | None = None,
        fallback: Call | None = None,
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
        self._plans: dict[tuple[int, torch.dtype], tuple[Decision, Call]] = {}
        self._tally = Tally()
        self._peer_visible: list[PeerVisibleBuffer] = []
        self._pulls: dict[tuple[int, int, torch.dtype], Call | None] = {}
        self._logged: set[str] = set()
        self._closed = False

        control_group = self._control_group = control_group or group
        cards = agreement.exchange(agreement.RankCard.of_this_rank(config, self.device), control_group)
        agreement.check(cards)
        config.check_world_size(self.world_size)
        self.facts = self._with_table(self._open_workspace(cards, control_group), cards, control_group)
        self._captures = self.device.type == "cuda"
        self._sizes = describe(config, self.facts, capturing=self._captures)
        if (eager := describe(config, self.facts, capturing=False)) != self._sizes:
            self._sizes += f" (eager calls: {eager})"
        if self.rank == 0:
            self._log_start()
        self._monitor: Monitor | None = None
        counters = metrics.RankCounters.if_wanted()
        if self._workspace is not None or config.report_dir is not None or counters is not None:
            this = weakref.ref(self)  # the thread must not keep an abandoned communicator alive
            self._monitor = Monitor(
                self._workspace,
                self.rank,
                config.report_dir,
                lambda: owner.report() if (owner := this()) else None,
                counters,
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
        buffer = PeerVisibleBuffer.open(self._group, self._control_group, self.device, size)
        self._peer_visible.append(buffer)
        return buffer.storage[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))

    def explain(self, shape: Sequence[int], dtype: torch.dtype, *, capturing: bool | None = None) -> Decision:
        """What :meth:`all_reduce` does with a tensor of this shape and dtype, and why. Pure: runs nothing.

        ``capturing``: while a CUDA graph is captured (the default on GPUs), else in an eager call.
        """
        captured = self._captures if capturing is None else capturing
        return decide(self.config, self.facts, math.prod(shape), dtype_name(dtype), capturing=captured)

    def call_of(self, strategy: str, count: int, dtype: torch.dtype) -> Call:
        """The call that another strategy would make with messages of this size: what tuning compares.

        Collective, like the calls themselves. Strategies share this communicator's workspace.

        Raises:
            RuntimeError: the strategy cannot run here, with the reason.
        """
        settings = self.config.model_copy(update={"allreduce_strategy": AllReduceStrategy.parse(strategy)})
        decision = decide(settings, self.facts, count, dtype_name(dtype))
        if decision.launch is None or decision.is_fallback:
            raise RuntimeError(decision.reason)
        return self._kernel_call(decision, count, dtype)

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
            "rank": self.rank,
            "world_size": self.world_size,
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
        if self._workspace is not None:
            raise_failure_of(self._workspace)

    def close(self) -> None:
        """Let go of the workspace. Idempotent. Calls in flight are waited for."""
        if self._closed:
            return
        self._closed = True
        if self._monitor is not None:
            self._monitor.close()
        if self._workspace is not None and self.device.type == "cuda" and failure_of(self._workspace) is None:
            torch.cuda.synchronize(self.device)
        self._tally.end()
        if self.rank == 0:
            logger.info("all-reduce summary: %s", self._tally.counts())
        self._plans.clear()
        self._pulls.clear()
        self._peer_visible.clear()
        self._workspace = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    # -- start ---------------------------------------------------------------------------------------------------------

    def _open_workspace(self, cards: list[agreement.RankCard], control_group: dist.ProcessGroup) -> GroupFacts:
        """Set up shared memory if the strategy can use it; the facts say what came of it."""
        nodes = len({card.host for card in cards})
        facts = GroupFacts(
            world_size=self.world_size,
            device=self.device.type,
            transport=Transport.NONE,
            architecture=cards[0].architecture,
            nodes=nodes,
            staged=self.config.staged,
            low_precision=self.config.low_precision,
            domains=agreement.domains(cards),
        )
        # What NVML says may differ from rank to rank (a container without it), so the answer is agreed.
        obstacle = agreement.first_fault(self._transport_obstacle(cards, nodes), control_group)
        if obstacle is not None:
            return dataclasses.replace(facts, no_transport_reason=obstacle)
        if self.device.type == "cuda":
            gpus = [card.gpu for card in cards if card.gpu is not None]
            facts = dataclasses.replace(facts, nvlink=agreement.first_fault(nvlink_gap(gpus), control_group) is None)
        refusal = agreement.peer_refusal_of(cards)
        if self.rank == 0 and (note := refusal_note(self.config.transport, refusal)) is not None:
            logger.info("%s", note)
        reasons = []
        multiprocessors = min(card.multiprocessors for card in cards)
        for transport in transports(self.config, self.device.type, refusal):
            try:
                layout = workspace_layout(self.config, dataclasses.replace(facts, transport=transport), multiprocessors)
                self._connect(transport, layout, cards, control_group)
            except (TransportError, ValueError) as error:
                reasons.append(str(error))
                continue
            if reasons and self.rank == 0:
                logger.warning("all-reduce goes through %s memory: %s", transport, "; ".join(reasons))
            return facts.with_layout(transport, layout)
        return dataclasses.replace(facts, no_transport_reason="; ".join(reasons))

    def _with_table(
        self, facts: GroupFacts, cards: list[agreement.RankCard], control_group: dist.ProcessGroup
    ) -> GroupFacts:
        """The facts with the links that the first rank sees and the profile that it finds: ranks' caches may differ.

        Raises:
            ConfigError: on every rank alike, when ``tuning_profile`` names a file that cannot be used.
        """
        if facts.transport is Transport.NONE:
            return facts
        from llm_allreduce_plugin.selection.tuning import facts_of_this_node

        visible = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        uuids = [card.gpu or "" for card in cards]
        try:
            return agreement.from_first_rank(
                lambda: facts_of_this_node(self.config, facts, uuids, visible), control_group, ConfigError
            )
        except ConfigError:
            self._workspace = None
            if self._memory is not None:
                self._memory.close()
            raise

    def _transport_obstacle(self, cards: list[agreement.RankCard], nodes: int) -> str | None:
        """Why not to try to share memory at all, as far as this rank can see."""
        if (reason := transport_obstacle(self.config, self.world_size, nodes, self.device.type)) is not None:
            return reason
        gpus = [card.gpu for card in cards if card.gpu is not None]
        return "several ranks share a GPU" if len(set(gpus)) < len(gpus) else None

    def _connect(
        self, transport: Transport, layout: _C.Layout, cards: list[agreement.RankCard], control_group: dist.ProcessGroup
    ) -> None:
        """Share memory of this layout and prove that it is shared. Collective.

        Raises:
            TransportError: on every rank alike, with the reason.
        """
        memory: SharedMemory
        device_index = _C.CPU if transport is Transport.SHM else self.device.index
        if transport is Transport.SHM:
            memory = ShmMemory.open(control_group, layout.total_bytes)
        elif transport is Transport.HOST:
            memory = HostMemory.open(control_group, self.device, layout)
        else:
            gpus = [card.gpu for card in cards if card.gpu is not None]
            if (obstacle := agreement.first_fault(p2p_obstacle(gpus), control_group)) is not None:
                raise TransportError(obstacle)
            memory = SymmetricMemory.open(self._group, control_group, self.device, layout)

        def make() -> _C.Workspace:
            if transport is not Transport.SHM:
                with torch.cuda.device(self.device):
                    _C.load_kernels(self.world_size)
            return _C.Workspace(self.rank, memory.bases, layout, self.config.timeout_s, device_index, memory.local)

        try:
            workspace = agreement.on_every_rank(make, control_group, TransportError, "cannot set up its workspace")
            if transport is not Transport.SHM:
                prove_peer_access(workspace, control_group, self.device)
        except TransportError:
            memory.close()
            raise
        self._memory, self._workspace = memory, workspace

    def _log_start(self) -> None:
        if self.facts.transport is Transport.NONE:
            logger.info(
                "all-reduce over %d ranks: %s: %s", self.world_size, self._sizes, self.facts.no_transport_reason
            )
            return
        logger.info(
            "all-reduce over %d ranks (%s memory, allreduce_strategy %s, sizes per rank): %s",
            self.world_size,
            self.facts.transport,
            self.config.allreduce_strategy,
            self._sizes,
        )
        if self.config.allreduce_strategy is AllReduceStrategy.LOWPRECISION:
            form = form_of(self.facts)
            level = logging.WARNING if form.is_fallback else logging.INFO
            logger.log(level, "LOWPRECISION runs as %s: %s", form.algorithm, form.reason)
        if (
            self.config.staged is StagedChoice.ON
            and self.rank == 0
            and (why := staging.obstacle(self.facts)) is not None
        ):
            logger.warning("staged is on, but nothing is staged: %s", why)
        if uses_table(self.config):
            logger.info("these sizes come from %s", table_of(self.config, self.facts, capturing=self._captures).source)
        # Says at once what asking for a strategy without a kernel leads to.
        decision = decide(self.config, self.facts, 1, "bfloat16")
        if decision.is_fallback:
            self._log_fallback(decision)

    # -- what runs -----------------------------------------------------------------------------------------------------

    def _plan(self, count: int, dtype: torch.dtype) -> tuple[Decision, Call]:
        if self._closed:
            message = "this communicator is closed"
            raise RuntimeError(message)
        decision = decide(self.config, self.facts, count, dtype_name(dtype), capturing=self._captures)
        if fallback_of(decision) is not None:
            self._log_fallback(decision)
        strategy = STRATEGIES[decision.strategy]
        is_ours = isinstance(strategy, KernelStrategy)
        run = self._kernel_call(decision, count, dtype) if is_ours else self._engine_call(decision)
        if is_ours and self._captures:
            eager = decide(self.config, self.facts, count, dtype_name(dtype), capturing=False)
            if eager.launch != decision.launch:
                run = by_capture(run, self._kernel_call(eager, count, dtype))
        entry = (decision, run)
        self._plans[(count, dtype)] = entry
        return entry

    def _engine_call(self, decision: Decision) -> Call:
        """A function that runs what no kernel here can."""
        capturing = torch.cuda.is_current_stream_capturing if self.device.type == "cuda" else bool
        call = CountedCall(self._fallback, capturing)
        self._tally.add(decision, call)
        return call

    def _log_fallback(self, decision: Decision) -> None:
        line = f"{decision.requested} falls back to {decision.strategy}: {decision.reason}"
        if self.rank == 0 and line not in self._logged:
            self._logged.add(line)
            logger.warning("%s", line)

    def _pull(self, input_: torch.Tensor) -> Call | None:
        """The call that reads this input in place; None when it must be sent, or is small enough to be sent faster."""
        found = next((i for i, buffer in enumerate(self._peer_visible) if buffer.holds(input_)), None)
        if found is None:
            return None
        key = (found, input_.numel(), input_.dtype)
        if key not in self._pulls:
            decision, _ = self._plans.get(key[1:]) or self._plan(*key[1:])
            launch = decision.launch
            two_shot = launch is not None and launch.algorithm is Algorithm.TWO_SHOT and launch.in_band
            two_shot &= input_.numel() > 0
            distances = self._peer_visible[found].peer_distances
            self._pulls[key] = self._kernel_call(decision, *key[1:], distances) if two_shot else None
        return self._pulls[key]

    def _kernel_call(
        self, decision: Decision, count: int, dtype: torch.dtype, peer_distances: Sequence[int] = ()
    ) -> Call:
        """A function that launches this decision, with all that does not change bound."""
        launch, workspace = decision.launch, self._workspace
        assert workspace is not None
        assert launch is not None
        plan = plan_of(workspace, launch, count, dtype, peer_distances)
        self._tally.add(decision, plan)
        return kernel_call(plan, launch, workspace, self.device, str(decision.strategy))
