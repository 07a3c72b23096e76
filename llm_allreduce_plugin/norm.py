"""What may follow a sum at a layer's boundary: a residual, RMSNorm, quantization. The types, and what comes out.

docs/fused.md defines the arithmetic; ``oracle.norm`` is the same in plain torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from llm_allreduce_plugin.quantization import FP4_GROUP, GROUP, UNIT, QuantKind, ScaleLayout, check_hidden

__all__ = [
    "FP4_GROUP",
    "FP8",
    "GROUP",
    "UNIT",
    "Normed",
    "Quant",
    "QuantKind",
    "ScaleLayout",
    "check_hidden",
    "empty_outputs",
]

FP8 = torch.float8_e4m3fn
ALIGNED_ROWS = 4  # scales, in fp32, in 16 bytes

_LAYOUTS = {
    QuantKind.FP8_GROUP: (ScaleLayout.ROWS, ScaleLayout.COLUMNS, ScaleLayout.UE8M0),
    QuantKind.NVFP4: (ScaleLayout.ROWS, ScaleLayout.SWIZZLED),
}


@dataclasses.dataclass(frozen=True)
class Quant:
    """How normed rows are quantized.

    Attributes:
        kind: what they become.
        scale: one fp32 element on the rows' device, where the kind needs one: values are divided by it (``fp8``), or
            scales multiplied (``nvfp4``).
        layout: of the scales that come out.
        aligned: ``columns`` begin at multiples of 16 bytes, as TMA reads them: what lies between the last row of one
            and the next is not written.

    Raises:
        ValueError: a field does not fit the kind.
    """

    kind: QuantKind
    scale: torch.Tensor | None = None
    layout: ScaleLayout = ScaleLayout.ROWS
    aligned: bool = False

    def __post_init__(self) -> None:
        if self.kind.needs_scale != (self.scale is not None):
            needs = "needs a scale of one fp32 element" if self.kind.needs_scale else "makes its own scales"
            message = f"Quant: scale: {self.kind} {needs}"
            raise ValueError(message)
        if self.scale is not None and (self.scale.numel() != 1 or self.scale.dtype != torch.float32):
            got = f"{self.scale.numel()} elements of {self.scale.dtype}"
            message = f"Quant: scale: got {got}; {self.kind} needs one fp32 element"
            raise ValueError(message)
        allowed = _LAYOUTS.get(self.kind, (ScaleLayout.ROWS,))
        if self.layout not in allowed:
            message = f"Quant: layout: {self.kind} has no {self.layout} (there are {', '.join(allowed)})"
            raise ValueError(message)
        if self.aligned and self.layout is not ScaleLayout.COLUMNS:
            message = f"Quant: aligned: must be False with layout {self.layout}; only {ScaleLayout.COLUMNS} are aligned"
            raise ValueError(message)

    def scale_stride(self, rows: int) -> int:
        """Scales from one of the ``columns`` to the next, for so many rows; 0 with another layout."""
        if self.layout is not ScaleLayout.COLUMNS:
            return 0
        return -(-rows // ALIGNED_ROWS) * ALIGNED_ROWS if self.aligned else rows


class Normed(NamedTuple):
    """What comes out of a boundary.

    Attributes:
        norm_out: the normed rows, like the input; None where only the quantized ones are wanted.
        residual_out: the sum, with the residual; like the input.
        quant_out: the normed rows quantized, e4m3 like the input, or uint8 with half as many columns (``nvfp4``).
        scale_out: their scales, of the layout that was asked for: fp32 ``[rows, 1]`` (``fp8-token``) or
            ``[rows, hidden / 128]``, int32 ``[rows, ceil(hidden / 512)]`` (``ue8m0``), e4m3 ``[rows, hidden / 16]``
            or, swizzled, with both padded to multiples of 128 and 4.
    """

    norm_out: torch.Tensor | None
    residual_out: torch.Tensor
    quant_out: torch.Tensor | None
    scale_out: torch.Tensor | None


def _scales(rows: int, hidden: int, quant: Quant, device: torch.device) -> torch.Tensor | None:
    kind, layout = quant.kind, quant.layout
    if kind is QuantKind.FP8:
        return None
    if kind is QuantKind.FP8_TOKEN:
        return torch.empty((rows, 1), dtype=torch.float32, device=device)
    if kind is QuantKind.NVFP4:
        scales = hidden // FP4_GROUP
        if layout is ScaleLayout.SWIZZLED:
            rows, scales = -(-rows // 128) * 128, -(-scales // 4) * 4
        return torch.empty((rows, scales), dtype=FP8, device=device)
    groups = hidden // GROUP
    if layout is ScaleLayout.UE8M0:
        padded = -(-rows // ALIGNED_ROWS) * ALIGNED_ROWS
        return torch.empty_strided((rows, -(-groups // 4)), (1, padded), dtype=torch.int32, device=device)
    strides = (groups, 1) if layout is ScaleLayout.ROWS else (1, quant.scale_stride(rows))
    return torch.empty_strided((rows, groups), strides, dtype=torch.float32, device=device)


def empty_outputs(input_: torch.Tensor, quant: Quant | None, *, return_norm: bool) -> Normed:
    """Room for what comes out for rows like ``input_``, whose last dimension is the hidden size; contiguous.

    Raises:
        ValueError: the hidden size does not fit, see :func:`check_hidden`.
    """
    shape: Sequence[int] = input_.shape
    hidden = shape[-1] if len(shape) else 0
    check_hidden(hidden, None if quant is None else quant.kind)
    rows = math.prod(shape[:-1])

    def like(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=input_.device)

    norm = like(shape, input_.dtype) if quant is None or return_norm else None
    if quant is None:
        return Normed(norm, like(shape, input_.dtype), None, None)
    quantized = like((*shape[:-1], hidden // 2), torch.uint8) if quant.kind is QuantKind.NVFP4 else like(shape, FP8)
    return Normed(norm, like(shape, input_.dtype), quantized, _scales(rows, hidden, quant, input_.device))
