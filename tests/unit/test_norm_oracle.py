"""The oracle of a layer's boundary against references that work it out number by number."""

from __future__ import annotations

import bisect
import itertools
import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_allreduce_plugin.norm import FP4_GROUP, GROUP, Normed, Quant, QuantKind, ScaleLayout
from llm_allreduce_plugin.oracle.norm import e2m1, e4m3, residual_rms_norm
from tests.support.norm_group import every_quant
from tests.support.reference import DTYPES, assert_same_bits, rank_input

F = np.float32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e4m3_value(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    return (mantissa + (8 if exponent else 0)) / 8 * 2.0 ** (max(exponent, 1) - 7)


E4M3 = [e4m3_value(code) for code in range(127)]  # 127 is NaN


def nearest(value: float, values: Sequence[float], nan: int, sign: int) -> int:
    """The code of the nearest of rising values, a tie to the even code, the last for all beyond; with its sign."""
    if math.isnan(value):
        return nan
    code = bisect.bisect_right(values, abs(value)) - 1
    if code + 1 < len(values):
        exact = Fraction(float(abs(value)))
        below, above = exact - Fraction(values[code]), Fraction(values[code + 1]) - exact
        code += above < below or (above == below and code % 2 == 1)
    return code | (sign if math.copysign(1.0, value) < 0 else 0)


def e4m3_code(value: float) -> int:
    return nearest(value, E4M3, 0x7F, 0x80)


def e2m1_code(value: float) -> int:
    return nearest(value, E2M1, 7, 8)


# -- conversions -------------------------------------------------------------------------------------------------------

FLOATS = st.floats(width=32) | st.floats(-500, 500, width=32) | st.floats(-8, 8, width=32)


@pytest.mark.parametrize(("convert", "reference"), [(e4m3, e4m3_code), (e2m1, e2m1_code)], ids=("e4m3", "e2m1"))
class TestConversions:
    @settings(max_examples=400, deadline=None)
    @given(FLOATS)
    def test_is_the_nearest(
        self, convert: Callable[[torch.Tensor], torch.Tensor], reference: Callable[[float], int], value: float
    ) -> None:
        assert int(convert(torch.tensor([value])).view(torch.uint8)[0]) == reference(value)

    def test_ties_and_their_neighbours(
        self, convert: Callable[[torch.Tensor], torch.Tensor], reference: Callable[[float], int]
    ) -> None:
        """Every code, every middle between two, and the fp32 numbers beside each."""
        codes = E4M3 if convert is e4m3 else E2M1
        middles = [(low + high) / 2 for low, high in itertools.pairwise(codes)]
        points = torch.tensor([*codes, *middles, 448.0, 464.0, 480.0, 1e30, math.inf])
        around = [points, torch.nextafter(points, torch.tensor(0.0)), torch.nextafter(points, torch.tensor(math.inf))]
        values = torch.cat([*around, *(-part for part in around), torch.tensor([math.nan, -math.nan])])
        expected = [reference(value) for value in values.tolist()]
        assert convert(values).view(torch.uint8).tolist() == expected


def test_e4m3_of_what_it_holds_is_the_same() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    assert e4m3(numbers).view(torch.uint8).tolist() == [0x7F if code == 0xFF else code for code in range(256)]
    positive = numbers[:127]
    assert positive.tolist() == E4M3


# -- rows, number by number --------------------------------------------------------------------------------------------


def rounded(value: np.float32, dtype: torch.dtype) -> np.float32:
    """To the type and back, by another way than torch's."""
    if dtype is torch.float32 or not math.isfinite(value):
        return value
    if dtype is torch.float16:
        return F(np.float16(value))
    word = struct.unpack("<I", struct.pack("<f", value))[0]
    word += 0x7FFF + (word >> 16 & 1)
    return F(struct.unpack("<f", struct.pack("<I", word & 0xFFFF0000))[0])


def tree(squares: Sequence[np.float32], leaves: int) -> np.float32:
    """The sum of the units below a node of so many leaves, from above to below; a node of none is +0."""
    if not squares:
        return F(0)
    if leaves == 1:
        q = squares[0:8]
        return ((q[0] + q[1]) + (q[2] + q[3])) + ((q[4] + q[5]) + (q[6] + q[7]))
    half = leaves // 2
    return tree(squares[: half * 8], half) + tree(squares[half * 8 :], half)


def norm_of_row(
    sums: list[float], residual: list[float] | None, weight: list[float], eps: float, bias: float, dtype: torch.dtype
) -> tuple[list[np.float32], list[np.float32]]:
    """The new residual and the normed row."""
    r = [F(s) for s in sums]
    if residual is not None:
        r = [rounded(s + F(other), dtype) for s, other in zip(r, residual, strict=True)]
    total = tree([x * x for x in r], 1 << 16)
    mean = total * (F(1) / F(len(r)))
    inverse = F(1) / np.sqrt(mean + F(eps))
    y = [rounded((x * inverse) * (F(w) + F(bias)), dtype) for x, w in zip(r, weight, strict=True)]
    return r, y


def largest(values: Sequence[np.float32]) -> np.float32:
    return F(math.nan) if any(math.isnan(value) for value in values) else max(abs(value) for value in values)


def power_above(scale: np.float32) -> np.float32:
    if not math.isfinite(scale):
        return F(math.inf)
    mantissa, exponent = math.frexp(scale)
    return F(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))


def quantized(y: Sequence[np.float32], quant: Quant) -> tuple[list[int], list[np.float32]]:
    """Codes, one for each element, and the scales of the row, those of e4m3 as codes."""
    given = F(quant.scale.item()) if quant.scale is not None else F(0)
    codes: list[int] = []
    scales: list[np.float32] = []
    if quant.kind is QuantKind.FP8:
        return [e4m3_code(value * (F(1) / given)) for value in y], []
    group = {QuantKind.FP8_TOKEN: len(y), QuantKind.FP8_GROUP: GROUP, QuantKind.NVFP4: FP4_GROUP}[quant.kind]
    for first in range(0, len(y), group):
        part = y[first : first + group]
        peak = largest(part)
        if quant.kind is QuantKind.NVFP4:
            code = e4m3_code(given * (peak / F(6)))
            as_float = F(math.nan) if code == 0x7F else F(E4M3[code])
            factor = F(0) if code == 0 else F(1) / (as_float * (F(1) / given))
            scales.append(F(code))
            codes += [e2m1_code(value * factor) for value in part]
            continue
        if quant.kind is QuantKind.FP8_TOKEN:
            scale = peak / F(448)
            scale = F(1 / (448 * 512)) if scale < F(1 / (448 * 512)) else scale
        else:
            scale = (F(1e-10) if peak < F(1e-10) else peak) / F(448)
            scale = power_above(scale) if quant.layout is ScaleLayout.UE8M0 else scale
        scales.append(scale)
        codes += [e4m3_code(value * (F(1) / scale)) for value in part]
    return codes, scales


def codes_of(outputs: Normed, kind: QuantKind) -> list[list[int]]:
    assert outputs.quant_out is not None
    stored = outputs.quant_out.view(torch.uint8).tolist()
    if kind is not QuantKind.NVFP4:
        return stored
    return [[code for byte in row for code in (byte & 15, byte >> 4)] for row in stored]


def scale_at(outputs: Normed, quant: Quant, hidden: int, row: int, number: int) -> np.float32:
    """Where the layouts say that it lies; exponents as the power, e4m3 as its code."""
    assert outputs.scale_out is not None
    flat = torch.as_strided(
        outputs.scale_out, (outputs.scale_out.untyped_storage().nbytes() // outputs.scale_out.element_size(),), (1,)
    )
    rows = outputs.residual_out.shape[0]
    if quant.kind is QuantKind.FP8_TOKEN:
        return F(flat[row].item())
    if quant.kind is QuantKind.NVFP4:
        columns = hidden // FP4_GROUP
        place = row * columns + number
        if quant.layout is ScaleLayout.SWIZZLED:
            tile = (row // 128 * -(-columns // 4) + number // 4) * 512
            place = tile + row % 32 * 16 + row % 128 // 32 * 4 + number % 4
        return F(flat.view(torch.uint8)[place].item())
    if quant.layout is ScaleLayout.UE8M0:
        exponent = int(flat.view(torch.uint8)[(number // 4 * (-(-rows // 4) * 4) + row) * 4 + number % 4])
        return F(math.inf) if exponent == 255 else F(2.0 ** (exponent - 127))
    column = -(-rows // 4) * 4 if quant.aligned else rows
    place = number * column + row if quant.layout is ScaleLayout.COLUMNS else row * (hidden // GROUP) + number
    return F(flat[place].item())


def check(
    sums: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, quant: Quant | None, bias: float
) -> None:
    dtype, (rows, hidden) = sums.dtype, sums.shape
    outputs = residual_rms_norm(sums, residual, weight, 1e-5, weight_bias=bias, quant=quant, return_norm=True)
    assert outputs.norm_out is not None
    for row in range(rows):
        other = None if residual is None else residual[row].tolist()
        with np.errstate(all="ignore"):
            r, y = norm_of_row(sums[row].tolist(), other, weight.tolist(), 1e-5, bias, dtype)
            for output, expected in ((outputs.residual_out, r), (outputs.norm_out, y)):
                assert_same_bits(output[row], torch.tensor(np.array(expected)).to(dtype), f"row {row}")
            if quant is None:
                continue
            codes, scales = quantized(y, quant)
        assert codes_of(outputs, quant.kind)[row] == codes
        for number, scale in enumerate(scales):
            got = scale_at(outputs, quant, hidden, row, number)
            assert got == scale or (math.isnan(got) and math.isnan(scale)), f"row {row}, scale {number}"


def any_rows(seed: int, kind: str, rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    values = rank_input(seed, 0, rows * hidden, torch.float32).view(rows, hidden)
    generator = torch.Generator().manual_seed(seed)
    if kind == "tiny":
        values *= 2.0**-120
    elif kind == "huge":
        values *= 2.0**60 if dtype is not torch.float16 else 2.0**8
    elif kind == "sparse":
        values *= torch.rand(values.shape, generator=generator) < 0.02
    elif kind == "special":
        special = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 0.0, 1e30, -1e-40])
        chosen = special[torch.randint(0, len(special), values.shape, generator=generator)]
        values = torch.where(torch.rand(values.shape, generator=generator) < 0.01, chosen, values)
    elif kind == "zeros":
        values = torch.full_like(values, -0.0)
    return values.to(dtype)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from(DTYPES),
    st.sampled_from((8, 16, 128, 384, 640)),
    st.sampled_from(("normal", "tiny", "huge", "sparse", "special", "zeros")),
    st.integers(0, 8),
    st.sampled_from((0.0, 1.0, 0.3)),
)
def test_number_by_number(seed: int, dtype: torch.dtype, hidden: int, kind: str, choice: int, bias: float) -> None:
    quants = every_quant(hidden)
    sums = any_rows(seed, kind, 2, hidden, dtype)
    residual = any_rows(seed + 1, kind, 2, hidden, dtype) if seed % 3 else None
    weight = rank_input(seed, 98, hidden, dtype)
    check(sums, residual, weight, quants[choice % len(quants)], bias)


@pytest.mark.parametrize("layout", (ScaleLayout.ROWS, ScaleLayout.SWIZZLED))
def test_scales_of_many_rows(layout: ScaleLayout) -> None:
    """More than a tile, the last of it partly filled: 130 rows, 5 scales each."""
    sums = any_rows(5, "normal", 130, 80, torch.bfloat16)
    check(sums, None, torch.ones(80, dtype=torch.bfloat16), Quant(QuantKind.NVFP4, torch.tensor([50.0]), layout), 0.0)


def test_what_pads_swizzled_scales_is_zero() -> None:
    quant = Quant(QuantKind.NVFP4, torch.tensor([50.0]), ScaleLayout.SWIZZLED)
    sums = any_rows(5, "normal", 130, 80, torch.bfloat16)
    scales = residual_rms_norm(sums, None, torch.ones(80, dtype=torch.bfloat16), 1e-5, quant=quant).scale_out
    assert scales is not None
    assert scales.shape == (256, 8)
    written = {
        (row // 128 * 2 + number // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + number % 4
        for row in range(130)
        for number in range(5)
    }
    rest = [code for place, code in enumerate(scales.flatten().view(torch.uint8).tolist()) if place not in written]
    assert len(rest) == 256 * 8 - 130 * 5
    assert not any(rest)


def test_exponents_that_there_are_not_are_zero() -> None:
    """640 elements have five groups: one in the second word of four."""
    quant = Quant(QuantKind.FP8_GROUP, layout=ScaleLayout.UE8M0)
    sums = any_rows(7, "normal", 3, 640, torch.bfloat16)
    words = residual_rms_norm(sums, None, torch.ones(640, dtype=torch.bfloat16), 1e-5, quant=quant).scale_out
    assert words is not None
    assert words.shape == (3, 2)
    assert words.stride() == (1, 4)
    assert all(0 < word < 256 for word in words[:, 1].tolist())
    assert all(word & 0xFFFFFFFF >= 1 << 24 for word in words[:, 0].tolist())
