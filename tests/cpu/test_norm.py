"""Rows that the CPU norms, against the oracle: sizes, quantizations, special values, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.norm import Normed, Quant, QuantKind, ScaleLayout
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from tests.support.norm_group import (
    Boundary,
    assert_nothing_between_columns,
    assert_same,
    every_quant,
    outputs_for,
    random_boundary,
    tensors_of,
)
from tests.support.reference import DTYPES, bits, fresh_seed, rank_input

HIDDEN = (8, 16, 2880, 4096, 5120, 7168, 8192, 16384, 16392, 65536)
CANONICAL_NAN = {torch.float32: 0x7FFFFFFF, torch.float16: 0x7FFF, torch.bfloat16: 0x7FFF}


def rms_norm(sums: torch.Tensor, boundary: Boundary, *, in_place: bool = False) -> Normed:
    outputs = outputs_for(sums, boundary)
    if in_place:
        outputs = outputs._replace(residual_out=sums)
    _C.rms_norm(
        boundary.norm(len(sums)),
        tensors_of(outputs, boundary),
        sums.data_ptr(),
        outputs.residual_out.data_ptr(),
        sums.numel(),
        DTYPE_CODES[sums.dtype],
        _C.CPU,
    )
    return outputs


def compare(sums: torch.Tensor, boundary: Boundary, what: str) -> Normed:
    before = sums.clone()
    residual = None if boundary.residual is None else boundary.residual.clone()
    outputs = rms_norm(sums, boundary)
    assert_same(outputs, boundary.expected(before), what)
    assert_nothing_between_columns(outputs, what)
    assert torch.equal(bits(sums), bits(before)), f"{what}: the input has changed"
    if residual is not None:
        assert boundary.residual is not None
        assert torch.equal(bits(boundary.residual), bits(residual)), f"{what}: the residual has changed"
    return outputs


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_and_quantization(dtype: torch.dtype, hidden: int) -> None:
    # More than the 128 rows of a tile of scales, or its 32, where that is quick: the oracle takes seconds for millions
    # of elements.
    for rows in (0, 1, 3, *([130] if hidden < 4096 else [33] if hidden <= 8192 else [])):
        for quant in every_quant(hidden):
            seed = fresh_seed()
            sums = rank_input(seed, 0, rows * hidden, dtype).view(rows, hidden)
            boundary = random_boundary(seed, rows, hidden, dtype, quant, residual=seed % 4 > 0)
            compare(sums, boundary, f"{rows} x {hidden} {dtype}, {quant}, seed {seed}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype: torch.dtype) -> None:
    seed, hidden = fresh_seed(), 1024
    for quant in every_quant(hidden):
        sums = rank_input(seed, 0, 5 * hidden, dtype).view(5, hidden)
        boundary = random_boundary(seed, 5, hidden, dtype, quant)
        expected = boundary.expected(sums)
        assert_same(rms_norm(sums, boundary, in_place=True), expected, f"{quant}, seed {seed}")


def rows_of_special_values(dtype: torch.dtype, hidden: int) -> torch.Tensor:
    """A row each of one value, and of one value among ordinary ones."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    values = [0.0, -0.0, 1.0, -1.0, 6.0, 448.0, info.max, -info.max, tiny, -tiny / 4, info.eps]
    values += [math.sqrt(tiny), 1e-10, math.inf, -math.inf, math.nan]
    ordinary = torch.linspace(-2, 2, hidden, dtype=torch.float64)
    rows = []
    for value in values:
        rows.append(torch.full((hidden,), value, dtype=torch.float64))
        among = ordinary.clone()
        among[hidden // 3] = value
        rows.append(among)
    signs = torch.ones(hidden, dtype=torch.float64)
    signs[::2] = -1
    rows += [signs * 1e-30, signs * 448, torch.where(signs > 0, ordinary * 1e-6, ordinary)]
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("weight", (1.0, -0.0, 1e-12, 1e4, math.nan))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype, weight: float) -> None:
    hidden = 384
    sums = rows_of_special_values(dtype, hidden)
    weights = torch.full((hidden,), weight, dtype=dtype)
    for quant in every_quant(hidden):
        for residual in (None, torch.zeros_like(sums), sums.flip(0)):
            boundary = Boundary(residual, weights, eps=1e-6, quant=quant, return_norm=True)
            outputs = compare(sums, boundary, f"{dtype}, weight {weight}, {quant}")
            assert outputs.norm_out is not None
            nans = bits(outputs.norm_out)[outputs.norm_out.isnan()]
            assert set(nans.tolist()) <= {CANONICAL_NAN[dtype]}, "not the one NaN of the type"


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_16_bit_pattern(dtype: torch.dtype) -> None:
    """In rows of like magnitudes and, shuffled, in rows of any."""
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    for values in (everything, everything[torch.randperm(1 << 16)]):
        sums = values.view(-1, 128)
        for quant in every_quant(128):
            boundary = Boundary(None, torch.ones(128, dtype=dtype), eps=1e-30, quant=quant, return_norm=True)
            compare(sums, boundary, f"{dtype}, {quant}")


@pytest.mark.parametrize("scale", (0.0, 1e-38, 1e-45, 1e30, math.inf, math.nan, -2.0))
@pytest.mark.parametrize("kind", (QuantKind.FP8, QuantKind.NVFP4))
def test_given_scales(kind: QuantKind, scale: float) -> None:
    sums = rows_of_special_values(torch.bfloat16, 64)
    quant = Quant(kind, torch.tensor([scale]))
    compare(sums, Boundary(None, torch.ones(64, dtype=torch.bfloat16), quant=quant), f"{kind}, scale {scale}")


# A quantization that fits rows of 128 and what makes it unfit, by the argument of Norm or NormTensors.
REFUSED: dict[str, tuple[Quant | None, dict[str, Any], dict[str, int], int]] = {
    "hidden is no multiple of 8": (None, {"hidden": 4}, {}, 128),
    "no hidden size": (None, {"hidden": 0}, {}, 128),
    "half a row": (None, {}, {}, 192),
    "no weight": (None, {}, {"weight": 0}, 128),
    "nothing comes out": (None, {}, {"norm_out": 0}, 128),
    "no room for codes": (Quant(QuantKind.FP8_TOKEN), {}, {"quant_out": 0}, 128),
    "no room for scales": (Quant(QuantKind.FP8_TOKEN), {}, {"scale_out": 0}, 128),
    "no scale for fp8": (Quant(QuantKind.FP8, torch.ones(1)), {}, {"scale": 0}, 128),
    "no scale for nvfp4": (Quant(QuantKind.NVFP4, torch.ones(1)), {}, {"scale": 0}, 128),
    "columns of tokens": (Quant(QuantKind.FP8_TOKEN), {"scales": _C.SCALES_COLUMNS}, {}, 128),
    "swizzled groups": (Quant(QuantKind.FP8_GROUP), {"scales": _C.SCALES_SWIZZLED}, {}, 128),
    "exponents of nvfp4": (Quant(QuantKind.NVFP4, torch.ones(1)), {"scales": _C.SCALES_UE8M0}, {}, 128),
    "a part of a group": (Quant(QuantKind.FP8_GROUP), {"hidden": 64}, {}, 128),
    "a part of 16": (Quant(QuantKind.NVFP4, torch.ones(1)), {"hidden": 8}, {}, 128),
    "unknown quantization": (None, {"quant": 5}, {}, 128),
    "columns closer than rows": (
        Quant(QuantKind.FP8_GROUP, layout=ScaleLayout.COLUMNS),
        {"scales": _C.SCALES_COLUMNS, "scale_stride": 1},
        {},
        256,
    ),
    "columns too far apart": (
        Quant(QuantKind.FP8_GROUP, layout=ScaleLayout.COLUMNS),
        {"scales": _C.SCALES_COLUMNS, "scale_stride": 1 << 32},
        {},
        256,
    ),
    "columns backwards": (
        Quant(QuantKind.FP8_GROUP, layout=ScaleLayout.COLUMNS),
        {"scales": _C.SCALES_COLUMNS, "scale_stride": -4},
        {},
        256,
    ),
    "a stride of scales in rows": (Quant(QuantKind.FP8_GROUP), {"scale_stride": 4}, {}, 256),
    "a stride of exponents": (
        Quant(QuantKind.FP8_GROUP, layout=ScaleLayout.UE8M0),
        {"scales": _C.SCALES_UE8M0, "scale_stride": 4},
        {},
        256,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    quant, of_norm, of_tensors, count = REFUSED[name]
    boundary = Boundary(torch.zeros(2, 128), torch.ones(128), quant=quant)
    sums = torch.ones(2, 128)
    outputs = outputs_for(sums, boundary)
    hidden = of_norm.get("hidden", 128)
    kind = _C.QUANT_NONE if quant is None else quant.kind.code
    norm = _C.Norm(
        hidden,
        1e-5,
        quant=of_norm.get("quant", kind),
        scales=of_norm.get("scales", _C.SCALES_ROWS),
        scale_stride=of_norm.get("scale_stride", 0),
    )
    addresses = {
        name: 0 if tensor is None else tensor.data_ptr()
        for name, tensor in (
            ("residual", boundary.residual),
            ("weight", boundary.weight),
            ("norm_out", outputs.norm_out),
            ("quant_out", outputs.quant_out),
            ("scale_out", outputs.scale_out),
            ("scale", None if quant is None else quant.scale),
        )
    }
    tensors = _C.NormTensors(**{**addresses, **of_tensors})
    residual_out = outputs.residual_out.data_ptr()
    with pytest.raises(RuntimeError, match="invalid argument"):
        _C.rms_norm(norm, tensors, sums.data_ptr(), residual_out, count, DTYPE_CODES[sums.dtype], _C.CPU)
    assert bool((outputs.residual_out.view(torch.uint8) == 0xA5).all()), "nothing may be written"
