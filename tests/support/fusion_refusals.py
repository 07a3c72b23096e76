"""Graphs with something that a fused call cannot do. See ``fusion_cases.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from llm_allreduce_plugin.engines.common import fusion
from tests.support.fusion_runs import make_inputs, run, same_layout
from tests.support.fusion_spellings import EPS, OnGpus, _custom_ops, all_reduce, fp8_utils, ir, layer, native


def _sum_used(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    total = all_reduce(x)
    return (*layer(total, weight, residual), total * 3)


def other_group(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    return layer(all_reduce(x, "ep:0"), weight, residual)


def _wide_weight(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    return layer(all_reduce(x), weight.float() * 2, residual)


def _part_of_variance(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    return ir.ops.fused_add_rms_norm(all_reduce(x), residual, weight, EPS, 64)


def _residual_of_sum(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    total = all_reduce(x)
    return layer(total, weight, residual + total.relu())


def _weighted_sum(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    return native(torch.add(residual, all_reduce(x), alpha=2), weight, None)


def _no_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    return all_reduce(x) + residual


ALONE = (
    _sum_used, other_group, _wide_weight, _part_of_variance, _residual_of_sum, _weighted_sum, _no_norm,
)  # fmt: skip


def _normed(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return layer(all_reduce(x), weight, residual)


def _scale_of_tensor(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    wide = y.abs().max().to(torch.float32) / 448
    return total, (y.float() * wide.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn), wide


def _other_limits(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    return total, (y.float() * scale.reciprocal()).clamp(-240, 240).to(torch.float8_e4m3fn)


def _scale_of_rows(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    given = residual[:, :1].float().abs() + 1
    return total, (y.float() * given.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)


def _narrow_scale(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    narrow = y.abs().amax(dim=-1, keepdim=True) / 448
    return total, (y.float() / narrow.float()).clamp(-448, 448).to(torch.float8_e4m3fn), narrow


def _groups_of_64(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    return total, *fp8_utils.per_token_group_quant_fp8(y, 64, use_ue8m0=False)


def _powers_of_two(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    return total, *fp8_utils.per_token_group_quant_fp8(y, 128, use_ue8m0=True)


def _bounded_scale(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    return total, *_custom_ops.scaled_fp8_quant(y, scale_ub=scale, use_per_token_if_dynamic=True)


def _padded_rows(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    return total, *_custom_ops.scaled_fp8_quant(y, scale, num_token_padding=17)


def _other_floor(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    held = (y.float().abs().amax(dim=-1, keepdim=True) / 448).clamp(min=0.01)
    return total, (y.float() * held.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn), held


NORM_ONLY = (
    _other_floor,
    _scale_of_tensor, _other_limits, _scale_of_rows, _narrow_scale, _groups_of_64, _powers_of_two, _bounded_scale,
    _padded_rows,
)  # fmt: skip


def check_left_alone(model: Callable[..., Any], expected: fusion.Fused, *, hidden: int = 768) -> None:
    """What cannot be fused gives what it gave before, from operators of plain torch bit for bit."""
    inputs = make_inputs(torch.bfloat16, hidden)
    with OnGpus(), torch.inference_mode():
        unfused = model(*(tensor.clone() for tensor in inputs))
        done, outputs, graph = run(model, inputs)
    assert done == expected, f"{done}\n{graph}"
    for got, want in zip(outputs, unfused, strict=True) if isinstance(unfused, tuple) else ((outputs, unfused),):
        same_layout(got, want, graph)
        if expected.count == 0 and "_C." not in graph:
            torch.testing.assert_close(got.float(), want.float(), rtol=0.02, atol=0.02)


def check_odd_width() -> None:
    check_left_alone(
        lambda x, residual, weight, scale: _normed(x, residual, weight), fusion.Fused(1, Counter()), hidden=12
    )
