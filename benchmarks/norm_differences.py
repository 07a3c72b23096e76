"""By how much others' residual + RMSNorm differs from ours, element by element, and which is nearer to the truth.

    python benchmarks/norm_differences.py --out benchmarks/norm_differences.json

Needs no GPU: each form is written down with its own roundings (``tests/unit/test_norm_differences.py`` holds those of
vLLM's IR and of Hugging Face against the libraries). A kernel's order of summing squares and its approximate reciprocal
square root are not among them; torch's stand in for both.

Data: sums of 4 ranks' parts, a residual stream 4 times as large, weights around 0.6; ``outliers``: 8 channels of the
residual are 100 times as large as the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.norm import Quant, QuantKind
from llm_allreduce_plugin.oracle.norm import residual_rms_norm

EPS, SEED, ROWS, WORLD_SIZE = 1e-5, 11, 512, 4

# Takes sum, residual and weight; gives the normed rows and the new residual.
Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _inverse(x: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def ours(sums: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = residual_rms_norm(sums, residual, weight, EPS)
    assert outputs.norm_out is not None
    return outputs.norm_out, outputs.residual_out


def rounded_once(sums: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As vLLM's CUDA kernel: of the rounded residual, in fp32, rounded once."""
    r = sums + residual
    x = r.float()
    return (x * _inverse(x) * weight.float()).to(r.dtype), r


def rounded_twice(
    sums: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As Hugging Face's LlamaRMSNorm behind a residual, and vLLM's CUDA kernel of earlier releases."""
    r = sums + residual
    x = r.float()
    return weight * (x * _inverse(x)).to(r.dtype), r


def unrounded_residual(
    sums: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As vLLM's IR in torch: of the residual before it is rounded, rounded twice."""
    x = sums.float() + residual.float()
    return (x * _inverse(x)).to(weight.dtype) * weight, x.to(sums.dtype)


FORMS: dict[str, Form] = {
    "vLLM's CUDA kernel": rounded_once,
    "vLLM's IR in torch": unrounded_residual,
    "LlamaRMSNorm; vLLM's earlier CUDA kernel": rounded_twice,
}


def data(hidden: int, dtype: torch.dtype, *, outliers: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sum of ranks' parts, a residual and a weight."""
    generator = torch.Generator().manual_seed(SEED)
    total = torch.zeros(ROWS, hidden)
    for _ in range(WORLD_SIZE):
        total += (torch.randn(ROWS, hidden, generator=generator) / 4).to(dtype).float()
    channels = torch.exp(torch.randn(hidden, generator=generator) / 2)
    if outliers:
        channels[torch.randperm(hidden, generator=generator)[:8]] *= 100
    residual = torch.randn(ROWS, hidden, generator=generator) * 2 * channels
    weight = 0.6 * torch.exp(torch.randn(hidden, generator=generator) / 4)
    return total.to(dtype), residual.to(dtype), weight.to(dtype)


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many numbers of the type lie between two of 16 bits."""

    def rank(values: torch.Tensor) -> torch.Tensor:
        words = values.view(torch.int16).int()
        return torch.where(words < 0, -(words & 0x7FFF), words)

    return (rank(a) - rank(b)).abs()


def exact(sums: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In fp64, nothing rounded."""
    x = sums.double() + residual.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def codes(y: torch.Tensor) -> torch.Tensor:
    """Normed rows as ``fp8-token`` has them, of the rows as they are: what one more rounding makes of a difference."""
    scale = (y.float().abs().amax(-1, keepdim=True) / 448).clamp_min(1 / (448 * 512))
    return (y.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def rows_of(hidden: int, dtype: torch.dtype, *, outliers: bool) -> list[dict[str, Any]]:
    given = data(hidden, dtype, outliers=outliers)
    truth, (mine, my_residual) = exact(*given), ours(*given)
    quantized = residual_rms_norm(*given, EPS, quant=Quant(QuantKind.FP8_TOKEN)).quant_out
    assert quantized is not None
    assert torch.equal(quantized.view(torch.uint8), codes(mine)), "codes() is not fp8-token"

    def error(y: torch.Tensor) -> float:
        return float((y.double() - truth).norm() / truth.norm())

    rows = []
    for name, form in FORMS.items():
        theirs, residual = form(*given)
        distance = ulps(theirs, mine)
        rows.append(
            {
                "form": name,
                "dtype": str(dtype).removeprefix("torch."),
                "hidden": hidden,
                "data": "outliers" if outliers else "normal",
                "residuals_differ": round(float((residual != my_residual).double().mean()), 6),
                "differ": round(float((distance > 0).double().mean()), 6),
                "largest_ulps": int(distance.max()),
                "fp8_codes_differ": round(float((codes(theirs) != codes(mine)).double().mean()), 6),
                "error": round(error(theirs), 6),
                "our_error": round(error(mine), 6),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [
        row
        for dtype in (torch.bfloat16, torch.float16)
        for hidden in (4096, 8192)
        for outliers in (False, True)
        for row in rows_of(hidden, dtype, outliers=outliers)
    ]
    for row in rows:
        print(row)
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__, seed=SEED)


if __name__ == "__main__":
    main()
