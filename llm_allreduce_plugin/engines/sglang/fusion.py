"""Fused layer boundaries: where SGLang would run all-reduce, residual and RMSNorm in one kernel, ours runs.

SGLang leaves a sum to the norm behind it where a fused kernel of FlashInfer's may take it. These hooks say that one
may, and give it ours. They come in with the first tensor-parallel group: only processes with layers have one.

1. ``flashinfer_ar_fusion_applies`` (until 0.5.21 ``apply_flashinfer_allreduce_fusion``), around it: true for batches of
   any size, on any GPU and on CPU ranks.
2. ``_forward_with_allreduce_fusion``, around it: what both RMSNorm classes of SGLang call for such a boundary.
   A registry of kernels that complete a layer's sum, asked at both places, would replace them.
3. Until 0.5.21 dense models sum at once: ``dense_layers.py``. Layer boundaries for them, as in 0.5.22, replace it.
4. Where a model's own kernels sum through SGLang's custom all-reduce, they go on doing so, and the log says it once.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch

from llm_allreduce_plugin.engines.common import fusion_ops
from llm_allreduce_plugin.engines.sglang import hooks
from llm_allreduce_plugin.engines.sglang.hooks import Hook
from llm_allreduce_plugin.engines.sglang.settings import unfused

if TYPE_CHECKING:
    from llm_allreduce_plugin.config import AllReduceConfig

logger = logging.getLogger("llm_allreduce_plugin")

ATTRIBUTE = "llm_allreduce"  # of a group: its communicator
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_VECTOR = 8  # elements: rows are a multiple of it

_APPLIES = (
    "sglang.srt.layers.layer_boundary.residual.add_norm.flashinfer_ar_fusion_applies",
    "sglang.srt.layers.layer_boundary.residual.add_norm.apply_flashinfer_allreduce_fusion",
    "sglang.srt.layers.communicator.apply_flashinfer_allreduce_fusion",
)
_NORM = "sglang.srt.layers.layernorm._forward_with_allreduce_fusion"
# Where kernels of models are given SGLang's custom all-reduce to sum through.
_OWN = (
    "sglang.srt.layers.quantization.mxfp4_flashinfer_trtllm_moe.register_fused_all_reduce_comm",
    "sglang.kernels.ops.communication.all_reduce_residual.register_comm",
    "sglang.kernels.ops.kimi_k3.all_reduce.register_comm",
)


@functools.cache
def _hooks() -> tuple[Hook, ...]:
    from llm_allreduce_plugin.engines.sglang import dense_layers

    applies = next((target for target in _APPLIES if hooks.exists(target)), _APPLIES[0])
    return (Hook(applies, applies_to, "AROUND"), Hook(_NORM, all_reduce_add_norm, "AROUND"), *dense_layers.our_hooks())


def install(server_args: Any, settings: AllReduceConfig, *, talks: bool) -> None:  # noqa: ANN401
    """Let layers of this process use fused calls, or say why not. ``talks``: this rank tells it."""
    reason = unfused(server_args, settings)
    if reason is None:
        reason = _installed()
    if reason is not None:
        if talks:
            logger.info("all-reduce fusion: layer boundaries are not fused: %s", reason)
        return
    _watch_own_kernels(talks=talks)


@functools.cache
def _installed() -> str | None:
    """Put the hooks in, once. Why that failed, or None."""
    wanted = _hooks()
    if absent := hooks.missing(wanted):
        return f"this SGLang has no {', '.join(absent)}"
    hooks.add_late(wanted)
    if lost := hooks.not_applied(wanted):
        return f"the hooks at {', '.join(lost)} did not take"
    return None


@functools.cache
def _watch_own_kernels(*, talks: bool) -> None:
    if not torch.cuda.is_available() or not talks:
        return

    @functools.cache
    def say() -> None:
        logger.info(
            "all-reduce fusion: this model has kernels of its own that sum through SGLang's custom all-reduce: "
            "they go past allreduce_strategy"
        )

    def after(_result: Any, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401
        say()

    hooks.add_late([Hook(target, after, "AFTER") for target in _OWN if hooks.exists(target)])


# -- the hooks ---------------------------------------------------------------------------------------------------------


def _group(*, attention: bool) -> Any:  # noqa: ANN401
    """The group over which a boundary sums: behind attention, or behind an MLP or experts."""
    from sglang.srt.layers.moe import utils
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if attention:
        group = parallel.attn_tp_group
    elif hasattr(utils, "post_experts_reduction_group"):
        group = utils.post_experts_reduction_group()
    else:
        group = parallel.moe_ep_group if parallel.moe_ep_size > 1 else parallel.moe_tp_group
    # PD-multiplexing puts a second group of the same ranks in the place of this one only.
    tensor_parallel = parallel.tp_group
    return tensor_parallel if group.ranks == tensor_parallel.ranks else group


def applies_to(original: Any, batch_size: int) -> bool:  # noqa: ANN401
    """Around SGLang's question whether boundaries of a batch are fused."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled

    ours = all(getattr(_group(attention=attention), ATTRIBUTE, None) is not None for attention in (True, False))
    if not ours or is_dp_attention_enabled():
        return bool(original(batch_size))
    return batch_size > 0


def all_reduce_add_norm(
    original: Any,  # noqa: ANN401
    norm: Any,  # noqa: ANN401
    x: torch.Tensor,
    residual: torch.Tensor | None,
    post_residual_addition: torch.Tensor | None,
    weight: torch.Tensor,
    use_attn_tp_group: bool = True,  # noqa: FBT001, FBT002
) -> Any:  # noqa: ANN401
    """Around what RMSNorm classes do at a fused boundary: the sum of ``x``, plus the residual, normed.

    Args:
        original: SGLang's.
        norm: the module.
        x: this rank's part of the sum, ``[tokens, hidden]``.
        residual: what is added to it.
        post_residual_addition: what is added to the residual before.
        weight: of the norm; GemmaRMSNorm gives its own plus 1, rounded.
        use_attn_tp_group: sum over the group of attention, not of experts.

    Returns:
        The norm, and the new residual: fresh tensors.
    """
    group = _group(attention=use_attn_tp_group)
    if residual is None or group.world_size == 1:
        return original(norm, x, residual, post_residual_addition, weight, use_attn_tp_group)
    fresh = residual if post_residual_addition is None else residual + post_residual_addition
    if getattr(group, ATTRIBUTE, None) is not None and can_fuse(norm, x, fresh, weight):
        bias = 0.0
        if weight is getattr(norm, "gemma_weight", None) and norm.weight.dtype is x.dtype:
            weight, bias = norm.weight, 1.0  # without its rounding
        arguments = (x, fresh, weight, norm.variance_epsilon, bias, "", "", None, False, group.unique_name)
        if torch.compiler.is_compiling():
            residual_out, norm_out = torch.ops.llm_allreduce.all_reduce_rms_norm(*arguments)
        else:
            residual_out, norm_out = fusion_ops.all_reduce_rms_norm(*arguments)
        return norm_out, residual_out
    # Not left to the original: before 0.5.22 it forgets the sum where FlashInfer is not there. Norms write in place.
    return norm.forward(group.all_reduce(x), fresh.clone() if fresh is residual else fresh, None)


def can_fuse(norm: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> bool:  # noqa: ANN401
    """Whether a boundary is one that our kernels compute: like SGLang's norm, with one type for all."""
    other = ("cast_x_before_out_mul", "fp32_residual", "variance_size_override", "override_orig_dtype")
    return (
        x.dtype in _TYPES
        and residual.dtype is x.dtype
        and weight.dtype is x.dtype
        and weight.device == x.device
        and residual.shape == x.shape
        and weight.shape == x.shape[-1:]
        and x.shape[-1] % _VECTOR == 0
        and not any(getattr(norm, name, None) for name in other)
    )
