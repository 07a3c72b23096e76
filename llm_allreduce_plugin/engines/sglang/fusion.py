"""Fused layer boundaries: where SGLang would run all-reduce, residual and RMSNorm in one kernel, ours runs.

SGLang leaves a sum to the norm behind it where a fused kernel of FlashInfer's may take it. These hooks say that one
may, and give it ours. They come in with the first tensor-parallel group, which only processes with layers have, and
before that in the process that starts those: it turns FlashInfer's fusion off, and must know that ours can be there.

1. ``flashinfer_ar_fusion_applies`` (until 0.5.21 ``apply_flashinfer_allreduce_fusion``), around it: true for batches of
   any size, on any GPU and on CPU ranks (``boundaries.py``).
2. ``_forward_with_allreduce_fusion``, around it: what both RMSNorm classes of SGLang call for such a boundary.
   A registry of kernels that complete a layer's sum, asked at both places, would replace them.
3. Until 0.5.21 dense models sum at once: ``dense_layers.py``. Layer boundaries for them, as in 0.5.22, replace it.
4. Where a model's own kernels sum through SGLang's custom all-reduce, they go on doing so: ``own_kernels.py``.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from llm_allreduce_plugin.engines.sglang import boundaries, dense_layers, hooks, own_kernels
from llm_allreduce_plugin.engines.sglang.hooks import Hook
from llm_allreduce_plugin.engines.sglang.settings import experts_in_parts, unfused_by_arguments

if TYPE_CHECKING:
    from llm_allreduce_plugin.config import AllReduceConfig

logger = logging.getLogger("llm_allreduce_plugin")

_APPLIES = (
    "sglang.srt.layers.layer_boundary.residual.add_norm.flashinfer_ar_fusion_applies",
    "sglang.srt.layers.layer_boundary.residual.add_norm.apply_flashinfer_allreduce_fusion",
    "sglang.srt.layers.communicator.apply_flashinfer_allreduce_fusion",
)
_NORM = "sglang.srt.layers.layernorm._forward_with_allreduce_fusion"
# Versions that have it sum experts that are split both ways over the whole group at once.
_MERGED = "sglang.srt.layers.moe.utils.post_experts_reduction_group"


@functools.cache
def _hooks() -> tuple[Hook, ...]:
    applies = next((target for target in _APPLIES if hooks.exists(target)), _APPLIES[0])
    return (
        Hook(applies, boundaries.applies_to, "AROUND"),
        Hook(_NORM, boundaries.all_reduce_add_norm, "AROUND"),
        *dense_layers.our_hooks(),
    )


def prepare(server_args: Any, settings: AllReduceConfig) -> str | None:  # noqa: ANN401
    """Put the hooks in; why this plugin fuses no layer boundaries all the same, or None: it does.

    For the process that starts the others, which then turns FlashInfer's fusion off, and for each rank: without the
    hooks nothing of SGLang's may be taken away. The first one thereby imports SGLang's layers before it has resolved
    its arguments.
    """
    reason = unfused_by_arguments(server_args, settings)
    if reason is None and (parts := experts_in_parts(server_args)) is not None and not hooks.exists(_MERGED):
        reason = parts
    return _installed() if reason is None else reason


def install(server_args: Any, settings: AllReduceConfig, *, talks: bool) -> None:  # noqa: ANN401
    """Let layers of this process use fused calls, or say why not. ``talks``: this rank tells it."""
    reason = prepare(server_args, settings)
    if not talks:
        return
    if reason is not None:
        _say_not_fused(reason)
        return
    if getattr(server_args, "enforce_disable_flashinfer_allreduce_fusion", False):
        _say_kept_off()
    own_kernels.watch()


@functools.cache
def _say_not_fused(reason: str) -> None:
    """Once, however many groups there are."""
    logger.info(
        "all-reduce fusion: layer boundaries are not fused: %s; where SGLang fuses them itself, those all-reduces "
        "bypass allreduce_strategy",
        reason,
    )


@functools.cache
def _say_kept_off() -> None:
    """Here and not where it is turned off: SGLang's first process has no logger yet when it looks at arguments."""
    logger.info(
        "all-reduce fusion: FlashInfer's is off, whose kernel would bypass allreduce_strategy: this plugin fuses the "
        "same layer boundaries"
    )


@functools.cache
def _installed() -> str | None:
    """Put the hooks in, once. Why that failed, or None."""
    wanted = _hooks()
    if absent := hooks.missing(wanted):
        return f"this SGLang has no {', '.join(absent)}"
    hooks.add_late(wanted)
    if lost := hooks.not_applied(wanted):
        return hooks.not_installed(lost)
    boundaries.start()
    return None
