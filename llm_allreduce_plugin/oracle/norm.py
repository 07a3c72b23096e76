"""Residual, RMSNorm and quantization in plain torch: what ``csrc/codec/norm.h`` does, operation for operation.

The order in which squares are summed depends on the hidden size alone: units of 8 elements in pairs, then a balanced
binary tree over at least 1024 units, those that there are not being +0.
"""

from __future__ import annotations

import math

import torch

from llm_allreduce_plugin.norm import (
    FP4_GROUP,
    FP8,
    GROUP,
    UNIT,
    Normed,
    Quant,
    QuantKind,
    ScaleLayout,
    empty_outputs,
)

LEAVES = 1024
LARGEST = 448.0  # of e4m3
NOT_FINITE = 255  # the exponent of fp32
_E2M1 = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between the codes
_TIES_UP = (False, True, False, True, False, True, False)  # a tie goes to the even code


def _pairs(values: torch.Tensor) -> torch.Tensor:
    return values[..., 0::2] + values[..., 1::2]


def sum_of_squares(rows: torch.Tensor) -> torch.Tensor:
    """fp32 ``[rows, hidden]`` to fp32 ``[rows]``."""
    squares = rows * rows
    units = _pairs(_pairs(_pairs(squares)))
    leaves = max(LEAVES, 1 << max(0, math.ceil(math.log2(max(1, units.shape[-1])))))
    tree = torch.nn.functional.pad(units, (0, leaves - units.shape[-1]))
    while tree.shape[-1] > 1:
        tree = _pairs(tree)
    return tree[..., 0]


def e4m3(values: torch.Tensor) -> torch.Tensor:
    """fp32 to e4m3: to nearest even, at most +-448; NaN is 0x7f; the sign of a zero stays."""
    codes = values.clamp(-LARGEST, LARGEST).to(FP8).view(torch.uint8)
    return torch.where(values.isnan(), torch.full_like(codes, 0x7F), codes).view(FP8)


def e2m1(values: torch.Tensor) -> torch.Tensor:
    """fp32 to codes 0 to 15 of e2m1, uint8: to nearest even, at most +-6; NaN is 7."""
    magnitude = values.abs()
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for limit, up in zip(_E2M1, _TIES_UP, strict=True):
        codes += (magnitude >= limit) if up else (magnitude > limit)
    codes |= torch.signbit(values).to(torch.uint8) << 3
    return torch.where(values.isnan(), torch.full_like(codes, 7), codes)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of the last dimension; NaN where any is."""
    return values.abs().amax(-1)


def _float32(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.full((), value, dtype=torch.float32, device=like.device)  # no copy from the host: graphs capture it


def _group_scales(y: torch.Tensor, layout: ScaleLayout) -> torch.Tensor:
    largest = _largest(y.view(*y.shape[:-1], -1, GROUP))
    least = _float32(1e-10, y)
    scale = torch.where(largest < least, least, largest) / _float32(LARGEST, y)
    if layout is not ScaleLayout.UE8M0:
        return scale
    bits = scale.view(torch.int32)
    exponent = bits >> 23
    exponent += ((bits & 0x7FFFFF) != 0) & (exponent < NOT_FINITE)
    return (exponent << 23).view(torch.float32)


def _fp4_scales(y: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return e4m3(given * (_largest(y.view(*y.shape[:-1], -1, FP4_GROUP)) / _float32(6.0, y)))


def _repeated(scales: torch.Tensor, group: int, hidden: int) -> torch.Tensor:
    return scales.repeat_interleave(group, -1)[..., :hidden]


def _swizzle(scales: torch.Tensor, out: torch.Tensor) -> None:
    rows, columns = scales.shape
    padded = torch.zeros(out.shape, dtype=torch.uint8, device=scales.device)
    padded[:rows, :columns] = scales.view(torch.uint8)
    tiles = padded.view(out.shape[0] // 128, 4, 32, out.shape[1] // 4, 4)
    out.view(torch.uint8).copy_(tiles.permute(0, 3, 2, 1, 4).reshape(out.shape))


def _pack_exponents(scales: torch.Tensor, out: torch.Tensor) -> None:
    rows, groups = scales.shape
    exponents = torch.zeros((rows, out.shape[1] * 4), dtype=torch.int64, device=scales.device)
    exponents[:, :groups] = scales.view(torch.int32) >> 23
    words = exponents.view(rows, -1, 4)
    packed = words[..., 0] | words[..., 1] << 8 | words[..., 2] << 16 | words[..., 3] << 24
    out.copy_(torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32))


def _quantize(y: torch.Tensor, quant: Quant, out: Normed) -> None:
    """fp32 values of the rounded rows ``[rows, hidden]``."""
    assert out.quant_out is not None
    rows, hidden = y.shape
    one = _float32(1.0, y)
    if quant.kind is QuantKind.FP8:
        assert quant.scale is not None
        codes = e4m3(y * (one / quant.scale))
    elif quant.kind is QuantKind.FP8_TOKEN:
        assert out.scale_out is not None
        scale = (_largest(y) / _float32(LARGEST, y)).unsqueeze(-1)
        least = _float32(1.0, y) / _float32(LARGEST * 512.0, y)
        scale = torch.where(scale < least, least, scale)
        out.scale_out.copy_(scale)
        codes = e4m3(y * (one / scale))
    elif quant.kind is QuantKind.FP8_GROUP:
        assert out.scale_out is not None
        scale = _group_scales(y, quant.layout)
        codes = e4m3(y * _repeated(one / scale, GROUP, hidden))
        if quant.layout is ScaleLayout.UE8M0:
            _pack_exponents(scale, out.scale_out)
        else:
            out.scale_out.copy_(scale)
    else:
        assert quant.scale is not None
        assert out.scale_out is not None
        scales = _fp4_scales(y, quant.scale)
        factor = torch.where(
            scales.view(torch.uint8) == 0, torch.zeros_like(one), one / (scales.float() * (one / quant.scale))
        )
        codes = e2m1(y * _repeated(factor, FP4_GROUP, hidden))
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
        if quant.layout is ScaleLayout.SWIZZLED:
            _swizzle(scales, out.scale_out)
        else:
            out.scale_out.copy_(scales)
    out.quant_out.view(torch.uint8).view(rows, -1).copy_(codes.view(torch.uint8).view(rows, -1))


def residual_rms_norm(
    sums: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    weight_bias: float = 0.0,
    quant: Quant | None = None,
    return_norm: bool = False,
) -> Normed:
    """What becomes of ``sums``.

    Args:
        sums: ``[..., hidden]``, of any floating dtype that kernels know.
        residual: like ``sums``, or None.
        weight: ``[hidden]``, of the same dtype.
        eps: added to the mean of the squares.
        weight_bias: added to the weight; 1 for Gemma.
        quant: how rows are quantized; None: not.
        return_norm: with ``quant``, the normed rows too.
    """
    out = empty_outputs(sums, quant, return_norm=return_norm)
    hidden = sums.shape[-1]
    assert hidden % UNIT == 0
    r = sums if residual is None else (sums.float() + residual.float()).to(sums.dtype)
    out.residual_out.copy_(r)
    x = r.float().reshape(-1, hidden)
    mean = sum_of_squares(x) * _float32(1.0, x).div(_float32(float(hidden), x))
    # torch's fp32 square root is off by a bit now and then; fp64 has more than twice the bits, so this rounds once.
    root = torch.sqrt((mean + _float32(eps, x)).double()).float()
    inverse = _float32(1.0, x) / root
    factor = weight.float() + _float32(weight_bias, x)
    y = ((x * inverse.unsqueeze(-1)) * factor).to(sums.dtype)
    if out.norm_out is not None:
        out.norm_out.copy_(y.view(sums.shape))
    if quant is not None and x.shape[0] > 0:
        _quantize(y.float(), quant, out)
    return out
