"""Llama's and Qwen2's layers before SGLang 0.5.22: their sums are left to the norms behind them, as MoE models' are.

By SGLang's own means: with ``fuse_mlp_allreduce`` set, a row-parallel projection gives its part of the sum, which then
goes to ``forward_with_allreduce_fusion`` of the next norm. Where something else looks at a layer's output, it is summed
at once: behind the last layer of a stage, and where hidden states are captured for a draft model.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import weakref
from typing import Any

import torch

from llm_allreduce_plugin.engines.sglang import boundaries, hooks
from llm_allreduce_plugin.engines.sglang.hooks import Hook

# Module: its layer, attention, MLP, and model.
_MODELS = {
    "llama": ("LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaModel"),
    "qwen2": ("Qwen2DecoderLayer", "Qwen2Attention", "Qwen2MLP", "Qwen2Model"),
}
_ARGUMENTS = ["self", "positions", "hidden_states", "forward_batch", "residual"]
_NEXT = "_llm_allreduce_model"  # of a layer with another one of its kind behind it: the model, weakly
_PART = "_llm_allreduce_part"  # of hidden states: they are a part of a sum


def our_hooks() -> list[Hook]:
    """Those for this version of SGLang; none where its layers have boundaries of SGLang's."""
    found = []
    for module, (layer, _, _, model) in _MODELS.items():
        place = f"sglang.srt.models.{module}"
        if hooks.exists(f"{place}.{layer}.forward") and _sums_at_once(place, layer):
            found += [
                Hook(f"{place}.{layer}.forward", forward, "AROUND"),
                Hook(f"{place}.{model}.__init__", note, "AFTER"),
            ]
    return found


def _sums_at_once(place: str, layer: str) -> bool:
    """Whether a layer is of the form that :func:`forward` knows."""
    kind = getattr(importlib.import_module(place), layer)
    return list(inspect.signature(kind.forward).parameters) == _ARGUMENTS


def _is_plain(layer: Any) -> bool:  # noqa: ANN401
    """Whether a layer is one of these models' own, with projections that leave their sum when they are told to."""
    from sglang.srt.layers.linear import RowParallelLinear
    from sglang.srt.runtime_context import get_parallel

    names = _MODELS.get(type(layer).__module__.rpartition(".")[2])
    if names is None or (type(layer).__name__, type(layer.self_attn).__name__, type(layer.mlp).__name__) != names[:3]:
        return False
    width = get_parallel().tp_size
    return all(
        type(projection) is RowParallelLinear  # LoRA's has another order
        and projection.reduce_results
        and projection.tp_size == width
        and not projection.use_dp_attention_reduce
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj)
    )


def note(_result: None, model: Any, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401
    """After a model was made: its layers know which of them have another one behind them."""
    layers = list(model.layers[model.start_layer : model.end_layer])
    for layer, following in itertools.pairwise(layers):
        if _is_plain(layer) and _is_plain(following):
            layer.__dict__[_NEXT] = weakref.ref(model)


def _leaves_sum(layer: Any) -> bool:  # noqa: ANN401
    """Whether nothing but the next layer looks at this one's output."""
    found = layer.__dict__.get(_NEXT)
    model = None if found is None else found()
    return model is not None and not model.layers_to_capture


def forward(
    original: Any,  # noqa: ANN401
    layer: Any,  # noqa: ANN401
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: Any,  # noqa: ANN401
    residual: torch.Tensor | None,
) -> Any:  # noqa: ANN401
    """Around a layer's forward."""
    from sglang.srt.runtime_context import get_forward, get_parallel

    if torch.compiler.is_compiling():  # in which a mark on a tensor and a weak reference have no place
        return original(layer, positions, hidden_states, forward_batch, residual)
    is_part = getattr(hidden_states, _PART, False)
    if not _is_plain(layer) or not _fuses(hidden_states.shape[0]):
        if is_part:
            hidden_states = get_parallel().tp_group.all_reduce(hidden_states)
        return original(layer, positions, hidden_states, forward_batch, residual)

    if residual is None:
        residual = hidden_states
        hidden_states = layer.input_layernorm(hidden_states)
    elif is_part:
        hidden_states, residual = layer.input_layernorm.forward_with_allreduce_fusion(
            hidden_states, residual, use_attn_tp_group=False
        )
    else:
        hidden_states, residual = layer.input_layernorm(hidden_states, residual)
    with get_forward().scoped(fuse_mlp_allreduce=True):
        hidden_states = layer.self_attn(positions=positions, hidden_states=hidden_states, forward_batch=forward_batch)
    hidden_states, residual = layer.post_attention_layernorm.forward_with_allreduce_fusion(
        hidden_states, residual, use_attn_tp_group=True
    )
    leaves_sum = _leaves_sum(layer)
    with get_forward().scoped(fuse_mlp_allreduce=leaves_sum):
        hidden_states = layer.mlp(hidden_states)
    if leaves_sum:
        setattr(hidden_states, _PART, True)
    return hidden_states, residual


def _fuses(rows: int) -> bool:
    return boundaries.applies_to(lambda _rows: False, rows)
