"""vLLM's compiled norm behind a sum, and what quantizes behind that: of the vLLM that is installed.

Read in vLLM 0.26, 0.32 and 0.33: ``_custom_ops.py`` and ``model_executor/layers/quantization/utils/fp8_utils.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llm_allreduce_plugin.norm import FP8, GROUP, Normed, Quant, QuantKind

# (sum, residual, weight, quantization) -> what comes out. Overwrites sum and residual.
Behind = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Quant | None], Normed]
_FP4_FROM = 10  # the first compute capability, before its dot, whose GPUs have kernels for FP4


def norms_behind(device: torch.device, eps: float) -> tuple[dict[QuantKind | None, Behind], dict[QuantKind, str]]:
    """What there is, by quantization; and why there is nothing for the others.

    Raises:
        RuntimeError: this vLLM has no compiled norm.
        ImportError: there is no vLLM.
    """
    import vllm._custom_ops as ops

    compiled = torch.ops._C  # noqa: SLF001  (vLLM's operators)
    if not hasattr(compiled, "fused_add_rms_norm"):
        message = "this vLLM has no compiled norm"
        raise RuntimeError(message)
    found: dict[QuantKind | None, Behind] = {}
    missing: dict[QuantKind, str] = {}

    def plain(total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, _quant: Quant | None) -> Normed:
        ops.fused_add_rms_norm(total, residual, weight, eps)
        return Normed(total, residual, None, None)

    def fp8(total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, quant: Quant | None) -> Normed:
        assert quant is not None
        quantized = torch.empty_like(total, dtype=FP8)
        compiled.fused_add_rms_norm_static_fp8_quant(quantized, total, residual, weight, quant.scale, eps)
        return Normed(None, residual, quantized, None)

    def fp8_token(total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, _quant: Quant | None) -> Normed:
        quantized, scales = ops.rms_norm_dynamic_per_token_quant(total, weight, eps, FP8, residual=residual)
        return Normed(None, residual, quantized, scales)

    found |= {None: plain, QuantKind.FP8: fp8, QuantKind.FP8_TOKEN: fp8_token}
    try:
        found[QuantKind.FP8_GROUP] = _groups(compiled, plain)
    except (ImportError, AttributeError) as error:
        missing[QuantKind.FP8_GROUP] = f"this vLLM does not quantize groups: {error}"
    if torch.cuda.get_device_capability(device)[0] < _FP4_FROM:
        missing[QuantKind.NVFP4] = f"vLLM quantizes to nvfp4 from sm_{_FP4_FROM}0 on"
    elif not (hasattr(ops, "scaled_fp4_quant") and hasattr(compiled, "scaled_fp4_quant")):
        missing[QuantKind.NVFP4] = "this vLLM has no scaled_fp4_quant"
    else:

        def nvfp4(total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, quant: Quant | None) -> Normed:
            assert quant is not None
            plain(total, residual, weight, None)
            codes, scales = ops.scaled_fp4_quant(total, quant.scale, is_sf_swizzled_layout=False)
            return Normed(total, residual, codes, scales)

        found[QuantKind.NVFP4] = nvfp4
    return found, missing


def _groups(compiled: object, plain: Behind) -> Behind:
    """Scales in fp32 and in rows, as :class:`Quant` has them unless asked otherwise.

    Raises:
        ImportError, AttributeError: this vLLM has no such kernel.
    """
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    compiled.per_token_group_fp8_quant  # type: ignore[attr-defined]  # noqa: B018  (else it would take Triton's)

    def fp8_group(total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, _quant: Quant | None) -> Normed:
        plain(total, residual, weight, None)
        quantized, scales = per_token_group_quant_fp8(total, GROUP, use_ue8m0=False)
        return Normed(total, residual, quantized, scales)

    return fp8_group
