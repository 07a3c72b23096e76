"""What happens at a layer boundary of SGLang's: whether it is fused, over which group, and the call itself."""

from __future__ import annotations

from typing import Any

import torch

from llm_allreduce_plugin.engines.common import fusion_ops

ATTRIBUTE = "llm_allreduce"  # of a group: its communicator

_all_hooks_took = False


def start() -> None:
    """From now on boundaries are answered for: all hooks are there. One without the other would lose sums."""
    global _all_hooks_took  # noqa: PLW0603  (plain, for compiled graphs guard on it)
    _all_hooks_took = True


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


def _is_fused(group: Any) -> bool:  # noqa: ANN401
    """Whether a group has a communicator of ours that norms behind its sums."""
    communicator = getattr(group, ATTRIBUTE, None)
    return communicator is not None and not communicator.no_norm_reason


def applies_to(original: Any, batch_size: int) -> bool:  # noqa: ANN401
    """Around SGLang's question whether boundaries of a batch are fused."""
    if not _all_hooks_took:
        return bool(original(batch_size))
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled
    from sglang.srt.runtime_context import get_forward

    ours = all(_is_fused(_group(attention=attention)) for attention in (True, False))
    # In sequence-parallel regions (from 0.5.22 on) projections reduce and scatter by themselves.
    if not ours or is_dp_attention_enabled() or getattr(get_forward(), "sp_active", False):
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
    if not _all_hooks_took:
        return original(norm, x, residual, post_residual_addition, weight, use_attn_tp_group)
    group = _group(attention=use_attn_tp_group)
    if residual is None or group.world_size == 1:
        return original(norm, x, residual, post_residual_addition, weight, use_attn_tp_group)
    fresh = residual if post_residual_addition is None else residual + post_residual_addition
    if _is_fused(group) and can_fuse(norm, x, fresh, weight):
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
    return fusion_ops.fits(x, residual, weight) and not any(getattr(norm, name, None) for name in other)
