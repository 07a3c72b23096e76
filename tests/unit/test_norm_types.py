"""How a boundary is described, what is refused, and the room for what comes out of it."""

from __future__ import annotations

import re

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.norm import Quant, QuantKind, ScaleLayout, check_hidden, empty_outputs

ONE = torch.ones(1)
E4M3 = torch.float8_e4m3fn
FITS = {
    QuantKind.FP8: (ScaleLayout.ROWS,),
    QuantKind.FP8_TOKEN: (ScaleLayout.ROWS,),
    QuantKind.FP8_GROUP: (ScaleLayout.ROWS, ScaleLayout.COLUMNS, ScaleLayout.UE8M0),
    QuantKind.NVFP4: (ScaleLayout.ROWS, ScaleLayout.SWIZZLED),
}


def test_names_and_numbers() -> None:
    assert [str(kind) for kind in QuantKind] == ["fp8", "fp8-token", "fp8-group", "nvfp4"]
    assert [kind.code for kind in QuantKind] == [1, 2, 3, 4]
    assert _C.QUANT_NONE == 0
    assert [str(layout) for layout in ScaleLayout] == ["rows", "columns", "ue8m0", "swizzled"]
    assert [layout.code for layout in ScaleLayout] == [0, 1, 2, 3]


@pytest.mark.parametrize("layout", list(ScaleLayout))
@pytest.mark.parametrize("kind", list(QuantKind))
def test_layouts(kind: QuantKind, layout: ScaleLayout) -> None:
    scale = ONE if kind.needs_scale else None
    if layout in FITS[kind]:
        assert Quant(kind, scale, layout).layout is layout
        return
    allowed = ", ".join(FITS[kind])
    with pytest.raises(ValueError, match=re.escape(f"Quant: layout: {kind} has no {layout} (there are {allowed})")):
        Quant(kind, scale, layout)


@pytest.mark.parametrize("layout", (ScaleLayout.ROWS, ScaleLayout.UE8M0))
def test_only_columns_are_aligned(layout: ScaleLayout) -> None:
    with pytest.raises(ValueError, match=f"Quant: aligned: must be False with layout {layout}; only columns are"):
        Quant(QuantKind.FP8_GROUP, layout=layout, aligned=True)
    assert Quant(QuantKind.FP8_GROUP, layout=layout).scale_stride(6) == 0
    assert Quant(QuantKind.FP8_GROUP, layout=ScaleLayout.COLUMNS).scale_stride(6) == 6
    aligned = Quant(QuantKind.FP8_GROUP, layout=ScaleLayout.COLUMNS, aligned=True)
    assert [aligned.scale_stride(rows) for rows in (0, 1, 4, 5)] == [0, 4, 4, 8]


@pytest.mark.parametrize("kind", list(QuantKind))
def test_scales(kind: QuantKind) -> None:
    if kind.needs_scale:
        for scale, got in ((torch.ones(2), "2 elements of torch.float32"), (ONE.half(), "1 elements of torch.float16")):
            with pytest.raises(ValueError, match=f"Quant: scale: got {got}; {kind} needs one fp32 element"):
                Quant(kind, scale)
        with pytest.raises(ValueError, match=f"Quant: scale: {kind} needs a scale of one fp32 element"):
            Quant(kind)
        assert Quant(kind, torch.ones(1, 1)).scale is not None
    else:
        with pytest.raises(ValueError, match=f"Quant: scale: {kind} makes its own scales"):
            Quant(kind, ONE)


@pytest.mark.parametrize(
    ("hidden", "kind", "multiple"),
    [
        (0, None, 8),
        (12, None, 8),
        (12, QuantKind.FP8, 8),
        (4, QuantKind.FP8_TOKEN, 8),
        (64, QuantKind.FP8_GROUP, 128),
        (2880, QuantKind.FP8_GROUP, 128),
        (8, QuantKind.NVFP4, 16),
    ],
)
def test_hidden_sizes_that_do_not_fit(hidden: int, kind: QuantKind | None, multiple: int) -> None:
    with pytest.raises(ValueError, match=rf"input: rows of {hidden} elements; .* needs a multiple of {multiple}"):
        check_hidden(hidden, kind)
    quant = None if kind is None else Quant(kind, ONE if kind.needs_scale else None)
    with pytest.raises(ValueError, match="needs a multiple of"):
        empty_outputs(torch.empty(3, hidden), quant, return_norm=False)


def test_a_number_has_no_rows() -> None:
    with pytest.raises(ValueError, match="rows of 0 elements"):
        empty_outputs(torch.tensor(1.0), None, return_norm=False)


Strided = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]


@pytest.mark.parametrize(
    ("quant", "codes", "scales"),
    [
        (Quant(QuantKind.FP8, ONE), (E4M3, (2, 3, 640)), None),
        (Quant(QuantKind.FP8_TOKEN), (E4M3, (2, 3, 640)), (torch.float32, (6, 1), (1, 1))),
        (Quant(QuantKind.FP8_GROUP), (E4M3, (2, 3, 640)), (torch.float32, (6, 5), (5, 1))),
        (
            Quant(QuantKind.FP8_GROUP, layout=ScaleLayout.COLUMNS),
            (E4M3, (2, 3, 640)),
            (torch.float32, (6, 5), (1, 6)),
        ),
        (
            Quant(QuantKind.FP8_GROUP, layout=ScaleLayout.COLUMNS, aligned=True),
            (E4M3, (2, 3, 640)),
            (torch.float32, (6, 5), (1, 8)),
        ),
        (Quant(QuantKind.FP8_GROUP, layout=ScaleLayout.UE8M0), (E4M3, (2, 3, 640)), (torch.int32, (6, 2), (1, 8))),
        (Quant(QuantKind.NVFP4, ONE), (torch.uint8, (2, 3, 320)), (E4M3, (6, 40), (40, 1))),
        (
            Quant(QuantKind.NVFP4, ONE, ScaleLayout.SWIZZLED),
            (torch.uint8, (2, 3, 320)),
            (E4M3, (128, 40), (40, 1)),
        ),
    ],
    ids=lambda value: f"{value.kind}-{value.layout}" if isinstance(value, Quant) else "",
)
@pytest.mark.parametrize("return_norm", (False, True))
def test_room(
    quant: Quant, codes: tuple[torch.dtype, tuple[int, ...]], scales: Strided | None, return_norm: bool
) -> None:
    input_ = torch.empty(2, 3, 640, dtype=torch.bfloat16)
    room = empty_outputs(input_, quant, return_norm=return_norm)
    assert (room.norm_out is not None) == return_norm
    for like in (room.residual_out, room.norm_out):
        assert like is None or (like.dtype, like.shape, like.is_contiguous()) == (torch.bfloat16, (2, 3, 640), True)
    assert room.quant_out is not None
    assert (room.quant_out.dtype, tuple(room.quant_out.shape), room.quant_out.is_contiguous()) == (*codes, True)
    if scales is None:
        assert room.scale_out is None
    else:
        assert room.scale_out is not None
        assert (room.scale_out.dtype, tuple(room.scale_out.shape), room.scale_out.stride()) == scales


def test_room_without_quantization() -> None:
    room = empty_outputs(torch.empty(5, 8, dtype=torch.float16), None, return_norm=False)
    assert room.norm_out is not None
    assert room.norm_out.shape == room.residual_out.shape == (5, 8)
    assert room.quant_out is None
    assert room.scale_out is None
