"""What normed rows may be quantized to: names and numbers. Without torch: the policy needs no more."""

from __future__ import annotations

import enum

from llm_allreduce_plugin import _C

UNIT = 8
"""Elements of which a hidden size is a multiple."""

GROUP = 128
"""Elements that share a scale of ``fp8-group``."""
FP4_GROUP = 16
"""Elements that share a scale of ``nvfp4``."""


class QuantKind(enum.StrEnum):
    """What normed values become."""

    FP8 = "fp8"
    """e4m3, by one scale that is given."""
    FP8_TOKEN = "fp8-token"  # noqa: S105
    """e4m3, with a scale for each row."""
    FP8_GROUP = "fp8-group"
    """e4m3, with a scale for each 128 elements of a row."""
    NVFP4 = "nvfp4"
    """e2m1, with an e4m3 scale for each 16 elements of a row, over one that is given."""

    @property
    def code(self) -> int:
        """Its number in the C ABI (``lar_quant``)."""
        return {
            QuantKind.FP8: _C.QUANT_FP8_TENSOR,
            QuantKind.FP8_TOKEN: _C.QUANT_FP8_TOKEN,
            QuantKind.FP8_GROUP: _C.QUANT_FP8_GROUP,
            QuantKind.NVFP4: _C.QUANT_NVFP4,
        }[self]

    @property
    def group(self) -> int:
        """Elements of which a hidden size must be a multiple."""
        return {QuantKind.FP8_GROUP: GROUP, QuantKind.NVFP4: FP4_GROUP}.get(self, UNIT)

    @property
    def needs_scale(self) -> bool:
        """Whether a scale is given."""
        return self in (QuantKind.FP8, QuantKind.NVFP4)


class ScaleLayout(enum.StrEnum):
    """How the scales of a matrix lie."""

    ROWS = "rows"
    COLUMNS = "columns"
    """``fp8-group``: those of a column are neighbours."""
    UE8M0 = "ue8m0"
    """``fp8-group``: powers of two, as exponents, four neighbours in an int32; words of a column are neighbours."""
    SWIZZLED = "swizzled"
    """``nvfp4``: in tiles of 128 rows by 4 scales, as tensor cores read them."""

    @property
    def code(self) -> int:
        """Its number in the C ABI (``lar_scales``)."""
        return {
            ScaleLayout.ROWS: _C.SCALES_ROWS,
            ScaleLayout.COLUMNS: _C.SCALES_COLUMNS,
            ScaleLayout.UE8M0: _C.SCALES_UE8M0,
            ScaleLayout.SWIZZLED: _C.SCALES_SWIZZLED,
        }[self]


def check_hidden(hidden: int, kind: QuantKind | None) -> None:
    """Refuse rows that nothing here norms.

    Raises:
        ValueError: ``hidden`` is not a multiple of what it must be.
    """
    multiple = UNIT if kind is None else kind.group
    if hidden < 1 or hidden % multiple:
        what = f"quantization {kind}" if kind is not None else "RMSNorm"
        message = f"input: rows of {hidden} elements; {what} needs a multiple of {multiple}"
        raise ValueError(message)
