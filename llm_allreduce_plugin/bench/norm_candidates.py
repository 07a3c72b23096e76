"""What is compared where residual and norm follow the all-reduce: ours in one kernel and in two, and what others have.

As with the all-reduce alone, every candidate is opened on all ranks together, and what cannot be is left out with its
reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llm_allreduce_plugin.base.agreement import on_every_rank
from llm_allreduce_plugin.bench.candidates import MIB, OurSettings, sglang_world
from llm_allreduce_plugin.bench.vllm_norms import norms_behind
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.norm import Normed, Quant, QuantKind, empty_outputs

EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class NormCase:
    """The arguments of a call: tensors of one rank.

    Attributes:
        input: ``[rows, hidden]``.
        residual: the same, equal on every rank.
        weight: ``[hidden]``.
        quant: how the norm is quantized; None: it is not.
    """

    input: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    quant: Quant | None = None

    @property
    def kind(self) -> QuantKind | None:
        """How the norm is quantized."""
        return None if self.quant is None else self.quant.kind


# A function that makes one given call and returns what it gives.
Bound = Callable[[], Normed]


@dataclasses.dataclass
class NormCandidate:
    """One implementation, ready to run.

    Attributes:
        bind: makes the call for one case.
        refusal: why a case is left out, or None.
        exact: gives the bits of the oracle. Others may be off by what rounding can cost.
        in_place: the call overwrites input and residual, so only the first answer after ``bind`` can be checked.
        graphs_overwrite: calls in a graph do so, others do not: answers of graphs cannot be checked.
        capturing: what it wants around a graph capture.
        close: lets go of its memory.
    """

    bind: Callable[[NormCase], Bound]
    refusal: Callable[[NormCase], str | None]
    exact: bool = False
    in_place: bool = False
    graphs_overwrite: bool = False
    capturing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    close: Callable[[], None] = lambda: None


Opener = Callable[[RankContext, OurSettings, int], NormCandidate]


def _ours(*, fused: bool) -> Opener:
    def open_(context: RankContext, settings: OurSettings, _hidden: int) -> NormCandidate:
        group = context.communicator(
            "AUTO", transport=settings.transport, tuning_profile=settings.tuning_profile, fuse_norm=fused
        )
        if (decision := group.explain((4096,), torch.bfloat16)).launch is None:
            raise RuntimeError(decision.reason)

        def bind(case: NormCase) -> Bound:
            return lambda: group.all_reduce_residual_rms_norm(
                case.input, case.residual, case.weight, EPS, quant=case.quant
            )

        def refusal(case: NormCase) -> str | None:
            decision = group.explain_fused(tuple(case.input.shape), case.input.dtype, case.kind)
            return decision.reason if fused and decision.launch is None else None

        return NormCandidate(bind, refusal, exact=True, close=group.close)

    return open_


def _only(*kinds: QuantKind | None) -> Callable[[NormCase], str | None]:
    """A refusal of all other quantizations."""
    return lambda case: None if case.kind in kinds else f"is not measured with {case.kind}"


def _vllm_norm(context: RankContext, _settings: OurSettings, _hidden: int) -> NormCandidate:
    """NCCL, then vLLM's compiled norm, both in place; what has no kernel with it is quantized behind it."""
    behind, missing = norms_behind(context.device, EPS)

    def bind(case: NormCase) -> Bound:
        total, residual = case.input.clone(), case.residual.clone()
        then = behind[case.kind]

        def call() -> Normed:
            dist.all_reduce(total, group=context.group)
            return then(total, residual, case.weight, case.quant)

        return call

    def refusal(case: NormCase) -> str | None:
        return None if case.kind is None else missing.get(case.kind)

    return NormCandidate(bind, refusal, in_place=True)


def _flashinfer(context: RankContext, _settings: OurSettings, hidden: int) -> NormCandidate:
    """FlashInfer's fused kernels, its choice between one-shot and two-shot; its back end without multicast."""
    from flashinfer import comm
    from flashinfer.comm.mnnvl import TorchDistBackend

    limit = 16 * MIB
    most_rows = max(1, limit // (2 * hidden))
    workspace = comm.create_allreduce_fusion_workspace(
        backend="trtllm",
        world_size=context.world_size,
        rank=context.rank,
        max_token_num=most_rows,
        hidden_dim=hidden,
        dtype=torch.bfloat16,
        comm_backend=TorchDistBackend(group=context.control_group),
        group=context.control_group,
    )
    known = comm.AllReduceFusionPattern
    patterns = {None: known.kARResidualRMSNorm, QuantKind.FP8: known.kARResidualRMSNormFP8Quant}
    if hasattr(known, "kARResidualRMSNormDynamicFP8Quant"):
        patterns[QuantKind.FP8_TOKEN] = known.kARResidualRMSNormDynamicFP8Quant

    def bind(case: NormCase) -> Bound:
        def call() -> Normed:
            outputs = empty_outputs(case.input, case.quant, return_norm=False)
            comm.allreduce_fusion(
                input=case.input,
                workspace=workspace,
                pattern=patterns[case.kind],
                launch_with_pdl=True,
                residual_in=case.residual,
                residual_out=outputs.residual_out,
                norm_out=outputs.norm_out,
                quant_out=outputs.quant_out,
                scale_out=outputs.scale_out,
                rms_gamma=case.weight,
                rms_eps=EPS,
                scale_factor=None if case.quant is None else case.quant.scale,
                fp32_acc=True,
            )
            return outputs

        return call

    def refusal(case: NormCase) -> str | None:
        if case.input.shape[0] > most_rows:
            return f"takes at most {most_rows} rows here"
        if case.input.dtype is not torch.bfloat16:
            return "is opened for bfloat16"
        return _only(*patterns)(case)

    return NormCandidate(bind, refusal, close=workspace.destroy)


def _sglang(context: RankContext, _settings: OurSettings, hidden: int) -> NormCandidate:
    """SGLang 0.5.23's push kernels, its choice of clusters; a row to a counter, the message in one slot."""
    from sglang.kernels.ops.communication import all_reduce_fusion
    from sglang.srt.distributed.device_communicators.custom_all_reduce_v2 import CustomAllReduceV2

    most_rows = torch.cuda.get_device_properties(context.device).multi_processor_count
    slot = most_rows * hidden * 2
    with sglang_world(context):
        plane = CustomAllReduceV2(
            context.control_group,
            context.device,
            max_pull_size=0,
            max_pull_blocks=0,
            max_push_size=slot,
            max_push_blocks=most_rows,
        )
    if plane.disabled:
        message = "SGLang disables it here"
        raise RuntimeError(message)
    if not all_reduce_fusion.valid_cluster_sizes(hidden):
        message = f"SGLang has no kernel for hidden size {hidden}"
        raise RuntimeError(message)
    all_reduce_fusion.register_comm(plane.obj)

    def bind(case: NormCase) -> Bound:
        def call() -> Normed:
            norm, residual = all_reduce_fusion.all_reduce_residual_norm(
                case.input,
                case.residual,
                case.weight,
                EPS,
                world_size=context.world_size,
                residual_out=torch.empty_like(case.residual),
            )
            return Normed(norm, residual, None, None)

        return call

    def refusal(case: NormCase) -> str | None:
        if case.input.shape[0] > most_rows:
            return f"takes at most {most_rows} rows here"
        if case.input.dtype is not torch.bfloat16:
            return "takes bfloat16"
        return _only(None)(case)

    return NormCandidate(bind, refusal, close=plane.close)


_OURS: dict[str, Opener] = {"fused": _ours(fused=True), "then-norm": _ours(fused=False)}
_GPU: dict[str, Opener] = _OURS | {"NCCL+vLLM-norm": _vllm_norm, "FlashInfer": _flashinfer, "SGLang": _sglang}


def names(device_type: str) -> tuple[str, ...]:
    """Every candidate for ranks on this kind of device, ours first."""
    return tuple(_OURS if device_type == "cpu" else _GPU)


def open_candidate(context: RankContext, name: str, settings: OurSettings, hidden: int) -> NormCandidate:
    """Collective.

    Raises:
        RuntimeError: on every rank alike, with the reason, when any rank cannot run it.
    """
    make = (_OURS if context.device.type == "cpu" else _GPU)[name]
    return on_every_rank(lambda: make(context, settings, hidden), context.control_group, RuntimeError)
