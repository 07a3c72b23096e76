"""Others' forms of the norm, as benchmarks/norm_differences.py has them, are those of the libraries."""

from __future__ import annotations

import pytest
import torch

from benchmarks import norm_differences
from benchmarks.norm_differences import EPS, data, ours, rounded_once, rounded_twice, ulps, unrounded_residual
from llm_allreduce_plugin.norm import Quant, QuantKind
from llm_allreduce_plugin.oracle.norm import residual_rms_norm
from tests.support.reference import assert_same_bits

SIXTEEN_BITS = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_differences, "ROWS", 16)


@SIXTEEN_BITS
def test_hugging_face(dtype: torch.dtype) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    sums, residual, weight = data(1024, dtype, outliers=True)
    norm = llama.LlamaRMSNorm(1024, EPS)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    expected_residual = residual + sums
    actual, actual_residual = rounded_twice(sums, residual, weight)
    assert_same_bits(actual_residual, expected_residual, "residual")
    assert_same_bits(actual, norm(expected_residual), "normed")


@SIXTEEN_BITS
def test_vllms_ir(dtype: torch.dtype) -> None:
    ops = pytest.importorskip("vllm.ir.ops")
    sums, residual, weight = data(1024, dtype, outliers=True)
    native = ops.fused_add_rms_norm.impls["native"].impl_fn
    expected, expected_residual = native(sums.clone(), residual.clone(), weight, EPS)
    actual, actual_residual = unrounded_residual(sums, residual, weight)
    assert_same_bits(actual_residual, expected_residual, "residual")
    assert_same_bits(actual, expected, "normed")


@SIXTEEN_BITS
def test_what_the_page_says(dtype: torch.dtype) -> None:
    """All have our residual. Rounded once, it is ours but for a last bit now and then; rounded twice, it is not."""
    given = data(1024, dtype, outliers=False)
    mine, residual = ours(*given)
    for form in (rounded_once, rounded_twice, unrounded_residual):
        assert torch.equal(form(*given)[1], residual)
    once, twice = (ulps(form(*given)[0], mine) for form in (rounded_once, rounded_twice))
    assert int(once.max()) <= 1
    assert float((once > 0).double().mean()) < 0.001
    assert float((twice > 0).double().mean()) > 0.1


def test_vllms_nvfp4() -> None:
    """Codes and scales as vLLM's reference for GPUs without FP4 has them."""
    emulation = pytest.importorskip("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")
    sums, residual, weight = data(1024, torch.bfloat16, outliers=True)
    scale = torch.tensor([448 * 6 / 20.0])
    outputs = residual_rms_norm(sums, residual, weight, EPS, quant=Quant(QuantKind.NVFP4, scale), return_norm=True)
    assert outputs.norm_out is not None and outputs.quant_out is not None and outputs.scale_out is not None
    expected, expected_scales = emulation.ref_nvfp4_quant(outputs.norm_out, scale, 16)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack([outputs.quant_out & 15, outputs.quant_out >> 4], -1).flatten(1)
    assert torch.equal(values[codes.long()], expected)
    assert torch.equal(outputs.scale_out.float(), expected_scales)
