"""TensorParallelCommunicator: the one object that an engine holds."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from llm_allreduce_plugin.algorithms.decision import Decision, FusedDecision
from llm_allreduce_plugin.algorithms.user_buffer import pool_obstacle, stores_only_here
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.base.cleanup import Ending
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.group.start_log import log_start, log_times
from llm_allreduce_plugin.norm import Normed, Quant, QuantKind
from llm_allreduce_plugin.runtime import norm_calls, placed_calls, reports
from llm_allreduce_plugin.runtime.calls import Call, torch_all_reduce
from llm_allreduce_plugin.runtime.closing import end
from llm_allreduce_plugin.runtime.held import hold, open_together
from llm_allreduce_plugin.runtime.planner import Planner, dtype_name
from llm_allreduce_plugin.selection.policy import decide, decide_fused, describe
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.peer import is_by_files
from llm_allreduce_plugin.transport.peer_visible import PeerVisibleBuffer


def _with_index(device: torch.device) -> torch.device:
    """The same, with its number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class TensorParallelCommunicator:
    """All-reduces of one tensor-parallel group.

    Construction is collective: every rank of ``group`` must take part, with the same settings. Calls are collective too
    and must come in the same order on every rank.

    Args:
        group: the tensor-parallel process group. On GPUs its NCCL group, on which torch maps memory where ranks cannot
            send each other files.
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
        self.device = _with_index(torch.device(device))
        self.config = config
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        # No bound methods of this object here or in the plans: without a cycle, an abandoned communicator ends where it
        # is dropped, and not wherever garbage happens to be collected.
        fallback = fallback or torch_all_reduce(group)
        self._closed = False

        self._control_group = control_group or group
        opened = open_together(self._control_group, group, self.device, config)
        self.facts = opened.facts
        self._identity = reports.Identity(self.rank, dist.get_process_group_ranks(group), name, opened.first_member)
        self._held = held = hold(opened, self._control_group, self.rank, self.device, config)
        self._planner = Planner(
            config, self.facts, self.rank, self.device, fallback,
            workspace=held.workspace, health=held.health, checker=held.checker, between=held.between, pool=held.pool,
        )  # fmt: skip
        # Looked at in every call.
        self._plans, self._peer_visible = self._planner.plans, self._planner.buffers
        self._eager_call, self._normed = self._planner.eager_call, self._planner.normed
        self._tally = self._planner.tally
        self._sizes = describe(config, self.facts)
        if self.rank == 0:
            log_start(config, self.facts, self._sizes)
            log_times(opened.times)
            self._planner.log_missing_kernel()
        this = weakref.ref(self)  # the threads must not keep an abandoned communicator alive
        held.watch(config, lambda: owner.report() if (owner := this()) else None, lambda: this() is not None)

    @property
    def no_norm_reason(self) -> str:
        """Why no kernel of this package norms behind sums, so that nothing is won by fusing; empty: one does."""
        return self.facts.no_norm_reason

    # -- calls ---------------------------------------------------------------------------------------------------------

    def all_reduce(self, input_: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of ``input_`` over all ranks.

        Args:
            input_: any shape, dtype and layout, on this communicator's device; the same shape and dtype on every
                rank. Never written.
            out: where the sum goes; like ``input_``, contiguous, and of other memory. Into those of
                :meth:`registered_empty`, which all ranks pass or none, peers may store straight away. None: a fresh
                tensor, which with ``UB`` is one of those.

        Returns:
            ``out``, or a fresh tensor like ``input_`` (shape, dtype, strides); bit-identical on every rank.

        Raises:
            ValueError: ``input_`` is on another device, or ``out`` cannot take its sum.
            PeerTimeoutError: a peer did not arrive within ``timeout_s``, in this call (CPU) or an earlier one (GPU).
            RuntimeError: the communicator is closed, or CUDA failed.
        """
        if out is None and not self._peer_visible and (output := self._eager_call(input_)) is not None:
            return output
        if input_.device != self.device:
            message = f"input is on {input_.device}, this communicator on {self.device}"
            raise ValueError(message)
        if out is not None:
            return self._all_reduce_into(input_, out)
        if self._peer_visible and (call := self._planner.pull(input_)) is not None:
            return call(input_)
        key = (input_.numel(), input_.dtype)
        entry = self._plans.get(key)
        if entry is None:
            entry = self._planner.plan(*key)
        return entry[1](input_)

    def _all_reduce_into(self, input_: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        placed_calls.check_output(input_, out)
        pool = self._held.pool
        registered = pool is not None and pool.holds(out)
        key = (input_.numel(), input_.dtype, registered)
        planned = self._planner.into.get(key)
        if planned is None:
            planned = self._planner.plan_into(input_.numel(), input_.dtype, registered=registered)
        return planned.call(input_, out)

    def all_reduce_residual_rms_norm(
        self,
        input_: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_bias: float = 0.0,
        quant: Quant | None = None,
        return_norm: bool = False,
    ) -> Normed:
        """The sum of ``input_`` over all ranks, plus a residual, normed row by row, and quantized.

        In one kernel where that can be and pays, otherwise in two, with the same bits: those of :meth:`all_reduce`,
        then ``residual_out = sum + residual``, rounded, and ``norm_out = residual_out / sqrt(mean(residual_out ** 2) +
        eps) * (weight + weight_bias)`` in fp32, rounded once. A row's result does not depend on the other rows.

        Args:
            input_: ``[..., hidden]``, fp32, fp16 or bf16, on this communicator's device; the same shape and dtype on
                every rank. ``hidden`` is a multiple of 8 (NVFP4: of 16, fp8-group: of 128). Never written.
            residual: like ``input_``, and equal on every rank; None: there is none, before a model's first layer.
            weight: ``[hidden]``, of the same dtype, equal on every rank.
            eps: added to the mean of squares.
            weight_bias: added to the weight: 1 for Gemma.
            quant: how the norm is quantized; None: it is not.
            return_norm: give ``norm_out`` beside what it is quantized to.

        Returns:
            Fresh, contiguous tensors, bit-identical on every rank. ``norm_out``: like ``input_``, None where only its
            quantization is wanted; ``residual_out``: like ``input_``; ``quant_out`` and ``scale_out``: see
            :func:`~llm_allreduce_plugin.norm.empty_outputs`.

        Raises:
            ValueError: a tensor is on another device, or of another shape or dtype; or such rows cannot be normed.
            PeerTimeoutError: a peer did not arrive within ``timeout_s``, in this call (CPU) or an earlier one (GPU).
            RuntimeError: the communicator is closed, or CUDA failed.
        """
        norm_calls.check_tensors(self.device, input_, residual, weight, quant)
        shape = norm_calls.shape_of(input_, residual, eps, weight_bias, quant, return_norm=return_norm)
        planned = self._normed.get(shape) or self._planner.plan_normed(shape)
        return planned.call(input_, residual, weight, quant)

    def peer_visible_empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in memory that every peer can read: calls that would be two-shot read their input there in place.

        Collective: every rank must ask for the same, and must pass tensors at the same place in it to a call. It lives
        as long as the communicator. Anything may be written to it, before a call and after, as to any tensor.

        Args:
            shape: of the tensor.
            dtype: of its elements.

        Returns:
            An uninitialized tensor; where ranks do not share GPU memory, or are on several hosts, an ordinary one.

        Raises:
            TransportError: the memory cannot be allocated or mapped.
            RuntimeError: the communicator is closed.
        """
        self._planner.check_open()
        size = max(1, math.prod(shape)) * dtype.itemsize
        shares = self.facts.transport is Transport.SYMMETRIC and self.facts.num_hosts == 1
        if not shares or not self.facts.in_band.two_shot:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        agreement = Agreement(self._control_group, self.config.start_timeout_s, when="for memory that peers see")
        try:
            buffer = PeerVisibleBuffer.open(
                agreement, self._group, self.device, size, by_files=is_by_files(self._held.memory)
            )
        finally:
            agreement.close()
        self._peer_visible.append(buffer)
        return buffer.storage[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))

    def let_graphs_share(self) -> None:
        """Let CUDA graphs take turns with the registered memory of their outputs, as those of one memory pool do.

        For engines that capture all their graphs into one pool: what a graph has returned lasts until the next replay.
        """
        if self._held.pool is not None:
            self._held.pool.graphs_share = True

    def registered_empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in registered memory, which peers may store into: for the ``out`` of :meth:`all_reduce`.

        The pool that it comes from is opened at the start (``registered_pool``) and does not grow. When the last
        reference to the tensor has gone, its bytes are free again. Ranks may take different tensors, at different
        places; but where one passes one of them to a call, all must.

        Args:
            shape: of the tensor.
            dtype: of its elements.

        Returns:
            An uninitialized tensor, from a multiple of 512 bytes on. Over two GPUs UB stores nothing into others'
            outputs, and unless ``registered_pool`` says otherwise it is a tensor like any other.

        Raises:
            RuntimeError: there is no registered memory, with the reason, or too little of it is free.
        """
        pool = self._held.pool
        if pool is None and not self._closed and stores_only_here(self.config, self.facts):
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        reason = pool_obstacle(self.config, self.facts) or "this communicator is closed"
        return placed_calls.registered_empty(pool, reason, shape, dtype)

    def explain(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        readable_in_place: bool = False,
        registered_output: bool | None = None,
    ) -> Decision:
        """What :meth:`all_reduce` does with a tensor of this shape and dtype, and why. Pure: runs nothing.

        ``readable_in_place``: it lies in memory of :meth:`peer_visible_empty`, from a multiple of 16 bytes on.
        ``registered_output``: ``out`` is a tensor of :meth:`registered_empty`, or another; None: there is none.
        """
        count, name = math.prod(shape), dtype_name(dtype)
        return decide(
            self.config, self.facts, count, name,
            readable_in_place=readable_in_place, registered_output=registered_output,
        )  # fmt: skip

    def explain_fused(self, shape: Sequence[int], dtype: torch.dtype, quant: QuantKind | None = None) -> FusedDecision:
        """What :meth:`all_reduce_residual_rms_norm` does with a tensor ``[..., hidden]``, and why. Pure: runs nothing.

        Raises:
            ValueError: rows of this size cannot be normed, or not quantized like this.
        """
        rows, hidden = math.prod(shape[:-1]), shape[-1]
        return decide_fused(self.config, self.facts, rows, hidden, dtype_name(dtype), quant)

    def call_of(self, strategy: str, count: int, dtype: torch.dtype) -> Call:
        """The call that another strategy would make with messages of this size: what tuning compares.

        Collective, like the calls themselves. Strategies share this communicator's workspace.

        Raises:
            RuntimeError: the strategy cannot run here, with the reason; or the communicator is closed.
        """
        return self._planner.call_of(strategy, count, dtype)

    def call_into_of(self, strategy: str, count: int, dtype: torch.dtype) -> placed_calls.CallInto:
        """The same into a tensor of :meth:`registered_empty`, which comes second.

        Raises:
            RuntimeError: the strategy cannot run here, with the reason; or the communicator is closed.
        """
        return self._planner.call_into_of(strategy, count, dtype)

    def norm_call_of(self, strategy: str, shape: norm_calls.NormShape, *, fused: bool) -> norm_calls.NormCall:
        """The same with a norm behind the sum, in one kernel (``fused``) or in two, whichever is faster.

        Raises:
            RuntimeError: the strategy cannot run here, or its norm not be fused, with the reason; or the communicator
                is closed.
        """
        return self._planner.norm_call_of(strategy, shape, fused=fused)

    def report(self) -> dict[str, Any]:
        """What this rank has done so far, ready for JSON.

        ``calls`` counts eager calls per strategy. ``captured`` counts calls recorded into CUDA graphs: their replays
        do not pass through Python and are not counted. ``fallbacks`` has the reasons, ``fallback_calls`` the calls of
        both kinds for each of them. ``registered_memory`` says how many outputs peers stored into, and how many were
        copied out because it was full, those of captured calls once; None: there is none, or this is closed.
        """
        pool = self._held.pool  # another thread may ask while this communicator closes
        return {
            **self._identity.fields(),
            "device": str(self.device),
            "transport": str(self.facts.transport),
            "allreduce_strategy": str(self.config.allreduce_strategy),
            "sizes": self._sizes,
            "closed": self._closed,
            **self._tally.counts().fields(),
            "registered_memory": None if pool is None else pool.use(),
        }

    def check(self) -> None:
        """Raise the error of an earlier call that the device could not raise itself.

        Raises:
            PeerTimeoutError: a wait has expired.
        """
        if self._held.health is not None:
            self._held.health.raise_error()

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
        self._planner.stop()
        ending = Ending()
        end(self._held, self._planner, ending)
        ending.raise_first()
