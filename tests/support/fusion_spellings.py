"""Norms and quantizations as vLLM's layers write them, for graphs that our pass searches. See ``fusion_cases.py``.

Importing this sets up vLLM, whichever version is found first, with operators of its GPU library on its CPU platform.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tests.support import gpu_operators

gpu_operators.define()  # before vLLM looks what there is

import vllm.platforms  # noqa: E402

if vllm.platforms.current_platform.is_unspecified():  # 0.26 knows its CPU platform by the name of its CPU build
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()

from vllm import _custom_ops, ir  # noqa: E402
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils import fp8_utils  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from llm_allreduce_plugin.norm import QuantKind, ScaleLayout  # noqa: E402

EPS = 3e-6  # none of the usual ones
GROUP = "tp:0"


def all_reduce(x: torch.Tensor, group: str = GROUP) -> torch.Tensor:
    return torch.ops.vllm.all_reduce(x, group)  # type: ignore[no-any-return]


# -- norms: (x, weight, residual or None) -> norm, residual_out --------------------------------------------------------

Norm = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], tuple[torch.Tensor, torch.Tensor]]


def layer(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    if residual is None:
        return ir.ops.rms_norm(x, weight, EPS), x
    return ir.ops.fused_add_rms_norm(x, residual, weight, EPS)


def gemma_layer(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    return layer(x, weight.float() + 1.0, residual)


def native(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    """What vLLM's own operators are made of, where they are not kept whole."""
    if residual is None:
        return ir.ops.rms_norm.impls["native"].impl_fn(x, weight, EPS, None), x
    return ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, EPS, None)


def native_gemma(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    return native(x, weight.float() + 1.0, residual)


def custom(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    if residual is None:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, EPS)
        return out, x
    torch.ops._C.fused_add_rms_norm(x, residual, weight, EPS)
    return x, residual


def transformers(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    """As Hugging Face's LlamaRMSNorm does it, the residual added before."""
    total = x if residual is None else residual + x
    wide = total.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(total.dtype), total


class OwnLayer:
    """A layer of vLLM, made as its models make it: with a weight in their type, which is no input of theirs."""

    def __init__(self, kind: type[torch.nn.Module]) -> None:
        self.kind = kind

    def load(self, weight: torch.Tensor) -> None:
        """Before anything is traced."""
        usual = torch.get_default_dtype()
        torch.set_default_dtype(weight.dtype)
        try:
            with set_current_vllm_config(_as_compiled()):
                self.layer = self.kind(weight.shape[0], eps=EPS)
        finally:
            torch.set_default_dtype(usual)
        self.layer.weight.data.copy_(weight)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
        done = self.layer(x, residual)
        return (done, x) if residual is None else done


@functools.cache
def _as_compiled() -> VllmConfig:
    """Norms are left to the compiler, as they are on GPUs."""
    return VllmConfig(compilation_config=CompilationConfig(custom_ops=["none"]))


OWN = {kind.__name__: OwnLayer(kind) for kind in (RMSNorm, GemmaRMSNorm)}
NORMS: dict[str, Norm] = OWN | {f.__name__: f for f in (layer, gemma_layer, native, native_gemma, custom, transformers)}
BIASED = ("GemmaRMSNorm", "gemma_layer", "native_gemma")


# -- quantizations: (norm, scale) -> quant_out, scale_out or None ------------------------------------------------------


class OnGpus:
    """While inside, vLLM's layers take the operators that they take on GPUs."""

    def __enter__(self) -> None:
        platform = type(current_platform)
        self.had = platform.__dict__.get("is_cuda_alike")
        platform.is_cuda_alike = lambda self: True

    def __exit__(self, *error: object) -> None:
        platform = type(current_platform)
        if self.had is None:
            del platform.is_cuda_alike
        else:
            platform.is_cuda_alike = self.had


def quant_layer(shape: GroupShape, *, static: bool = False, **options: Any) -> QuantFP8:
    with set_current_vllm_config(VllmConfig()):
        return QuantFP8(static, shape, compile_native=False, **options)


GROUP_128 = GroupShape(1, 128)


def _fp4(y: torch.Tensor, scale: torch.Tensor, *, swizzled: bool) -> Any:
    return _custom_ops.scaled_fp4_quant(y, scale, is_sf_swizzled_layout=swizzled)


QUANTS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], QuantKind, ScaleLayout]] = {}


def _add_quants() -> None:
    kinds, layouts = QuantKind, ScaleLayout
    for name, how, shape, kind, layout, options in (
        ("static", "cuda", GroupShape.PER_TENSOR, kinds.FP8, layouts.ROWS, {"static": True}),
        ("token", "cuda", GroupShape.PER_TOKEN, kinds.FP8_TOKEN, layouts.ROWS, {}),
        ("group", "cuda", GROUP_128, kinds.FP8_GROUP, layouts.ROWS, {"use_ue8m0": False}),
        ("group columns", "cuda", GROUP_128, kinds.FP8_GROUP, layouts.COLUMNS,
         {"use_ue8m0": False, "column_major_scales": True}),
        ("group aligned columns", "cuda", GROUP_128, kinds.FP8_GROUP, layouts.COLUMNS,
         {"use_ue8m0": False, "column_major_scales": True, "tma_aligned_scales": True}),
        ("native static", "native", GroupShape.PER_TENSOR, kinds.FP8, layouts.ROWS, {"static": True}),
        ("native token", "native", GroupShape.PER_TOKEN, kinds.FP8_TOKEN, layouts.ROWS, {}),
        ("native group", "native", GROUP_128, kinds.FP8_GROUP, layouts.ROWS, {"use_ue8m0": False}),
        ("native group columns", "native", GROUP_128, kinds.FP8_GROUP, layouts.COLUMNS,
         {"use_ue8m0": False, "column_major_scales": True}),
    ):  # fmt: skip
        forward = getattr(quant_layer(shape, **options), f"forward_{how}")  # type: ignore[arg-type]
        static = bool(options.get("static"))
        QUANTS[name] = (lambda y, s, f=forward, given=static: f(y, s) if given else f(y)), kind, layout
    packed = fp8_utils.per_token_group_quant_fp8_packed_for_deepgemm
    QUANTS["group packed"] = (lambda y, s: packed(y, 128, use_ue8m0=True)), kinds.FP8_GROUP, layouts.UE8M0
    QUANTS["nvfp4 swizzled"] = (lambda y, s: _fp4(y, s, swizzled=True)), kinds.NVFP4, layouts.SWIZZLED
    QUANTS["nvfp4 linear"] = (lambda y, s: _fp4(y, s, swizzled=False)), kinds.NVFP4, layouts.ROWS


_add_quants()
