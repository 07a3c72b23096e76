"""The compiled codecs against their torch oracles, bit for bit, and what the formats promise about special values."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle import CODECS, Codec
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES

DTYPES = tuple(DTYPE_CODES)
FORMATS = pytest.mark.parametrize("wire", list(WireFormat), ids=str)
WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def compiled_encode(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    packets = torch.full((codec.bytes_of(values.numel()),), 0xA5, dtype=torch.uint8)
    _C.encode(codec.code, DTYPE_CODES[values.dtype], values.data_ptr(), values.numel(), packets.data_ptr())
    return packets


def compiled_decode(codec: Codec, packets: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.full((count + 1,), 7.0, dtype=dtype)
    _C.decode(codec.code, DTYPE_CODES[dtype], packets.data_ptr(), count, values.data_ptr())
    assert values[count] == 7, "wrote behind the end"
    return values[:count]


def assert_same(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    """Both ways, compiled and oracle; what came back."""
    expected = codec.encode(values)
    packets = compiled_encode(codec, values)
    assert torch.equal(packets, expected)
    decoded = codec.decode(expected, values.numel())
    back = compiled_decode(codec, packets, values.numel(), values.dtype)
    rounded = decoded.to(values.dtype)
    assert torch.equal(back.isnan(), rounded.isnan())
    numbers = ~rounded.isnan()
    assert torch.equal(back.view(WORDS[values.dtype])[numbers], rounded.view(WORDS[values.dtype])[numbers])
    return decoded


def any_bits(seed: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern there is: NaN, infinities, subnormals, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    word = WORDS[dtype]
    limits = torch.iinfo(word)
    return torch.randint(limits.min, limits.max, (count,), generator=generator, dtype=word).view(dtype)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(WireFormat)),
    st.sampled_from(DTYPES),
    st.integers(1, 3000),
    st.integers(0, 1 << 30),
    st.sampled_from(("normal", "heavy", "tiny", "huge", "bits", "sparse", "one value")),
)
def test_compiled_codec_is_the_oracle(wire: WireFormat, dtype: torch.dtype, count: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    if kind == "heavy":
        values = values / torch.randn(count, generator=generator).abs().clamp_min(1e-3)
    elif kind == "tiny":
        values *= 2.0 ** -random.Random(seed).uniform(10, 149)
    elif kind == "huge":
        values *= 2.0 ** random.Random(seed).uniform(8, 126)
    elif kind == "bits":
        values = any_bits(seed, count, dtype)
    elif kind == "sparse":
        values *= torch.rand(count, generator=generator) < 0.05
    elif kind == "one value":
        values = torch.full((count,), float(values[0]))
    assert_same(CODECS[wire], values.to(dtype))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_pattern(wire: WireFormat, dtype: torch.dtype) -> None:
    """Beside neighbours of like size, and shuffled among all."""
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_same(CODECS[wire], everything)
    assert_same(CODECS[wire], everything[torch.randperm(1 << 16)])


@FORMATS
def test_packets(wire: WireFormat) -> None:
    codec = CODECS[wire]
    assert _C.packet_size(codec.code) == (codec.packet_values, codec.packet_bytes)
    assert codec.packet_bytes % _C.VECTOR_BYTES == 0, "packets lie at whole vectors"
    assert codec.bytes_of(0) == 0
    assert codec.round_trip(torch.zeros(0)).shape == (0,)
    assert codec.bytes_of(1) == codec.packet_bytes
    assert codec.bytes_of(codec.packet_values + 1) == 2 * codec.packet_bytes
    eights = {WireFormat.FP8: 512 * 8 / 496, WireFormat.FP8_GROUP: 512 * 8 / 480}
    assert codec.packet_bytes * 8 / codec.packet_values == eights.get(wire, 2.5)


@FORMATS
def test_finite_stays_finite(wire: WireFormat) -> None:
    codec = CODECS[wire]
    for largest in (3.38e38, 1e30, 65504.0, 65520.0, 1.0, 1e-30, 1e-38, 9.2e-41, 0.0):
        values = torch.linspace(-1, 1, 4096) * largest
        assert assert_same(codec, values).isfinite().all(), largest
        assert assert_same(codec, values.bfloat16()).isfinite().all(), largest


@FORMATS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(wire: WireFormat, bad: float) -> None:
    codec = CODECS[wire]
    values = torch.randn(4096)
    values[1234] = bad
    seen = assert_same(codec, values)
    assert not seen[1234].isfinite()
    where = (~seen.isfinite()).nonzero()
    block = range(1234, 1235) if wire.goes_in_band else range(1234 // 32 * 32, 1234 // 32 * 32 + 32)
    assert all(int(index) in block for index in where), "the damage ends with the block"
    if wire is WireFormat.TQ3 and math.isinf(bad):
        assert seen[1234] == bad


@FORMATS
def test_zeros(wire: WireFormat) -> None:
    for zero in (0.0, -0.0):
        seen = assert_same(CODECS[wire], torch.full((2000,), zero))
        assert (seen == 0).all()


def test_fp8_keeps_bf16_subnormals_and_large_neighbours_apart() -> None:
    for wire, together in ((WireFormat.FP8, 496), (WireFormat.FP8_GROUP, 32)):
        values = torch.full((2 * together,), 2.0**-133)  # the smallest bf16
        values[together:] = 2.0**-126
        seen = CODECS[wire].round_trip(values.bfloat16())
        assert (seen[:together] == 2.0**-133).all()
        assert (seen[together:] == 2.0**-126).all()


def test_fp8_rounds_every_binade_as_torch_does() -> None:
    """At a scale of 1: on, beside and between values of 7 bits, from below half of the smallest code to the largest."""
    upper = torch.arange(115 << 7, 136 << 7, dtype=torch.int32) << 16
    lower = torch.tensor((0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF), dtype=torch.int32)
    sizes = (upper[:, None] | lower).flatten().view(torch.float32)
    values = torch.cat((sizes[sizes <= 448], -sizes[sizes <= 448]))
    packets = torch.full((-(-values.numel() // 495), 496), 448.0)
    packets[:, :495] = torch.nn.functional.pad(values, (0, packets.shape[0] * 495 - values.numel())).view(-1, 495)
    seen = assert_same(CODECS[WireFormat.FP8], packets).view(-1, 496)[:, :495].reshape(-1)[: values.numel()]
    assert torch.equal(seen, values.to(torch.float8_e4m3fn).float())


def test_no_fp8_word_is_the_in_band_marker() -> None:
    for values in (torch.full((992,), -0.0), -torch.rand(4960) * 1e-6, any_bits(3, 49600, torch.bfloat16)):
        values[::7] *= 1e6
        for wire in (WireFormat.FP8, WireFormat.FP8_GROUP):
            words = CODECS[wire].encode(values).view(torch.int32)
            assert not (words == _C.IN_BAND_MARKER - (1 << 32)).any()


def test_fp8_group_has_a_bf16_scale_for_each_32_values() -> None:
    """The nearest to max|x| / 448; groups know nothing of each other."""
    codec = CODECS[WireFormat.FP8_GROUP]
    generator = torch.Generator().manual_seed(5)
    powers = torch.randint(-110, 110, (300,), generator=generator)
    values = torch.randn(32 * 300, generator=generator) * torch.exp2(powers.repeat_interleave(32).float())
    groups = values.view(-1, 32)
    scale = (groups.abs().amax(1, keepdim=True) / 448).bfloat16().float()
    seen = assert_same(codec, values).view(-1, 32)
    assert torch.equal(seen, (groups * (1 / scale)).to(torch.float8_e4m3fn).float() * scale)
    largest = groups.abs().argmax(1, keepdim=True)
    assert ((seen / groups).gather(1, largest) - 1).abs().max() < 2**-8, "the largest keeps its value"
    for first in (0, 32, 480 - 32, 480, 992):
        assert torch.equal(codec.round_trip(values[first : first + 32]), seen.view(-1)[first : first + 32])


def test_fp8_group_keeps_the_largest_values_finite() -> None:
    largest = torch.finfo(torch.float32).max
    for values in (torch.tensor((largest, -largest, 1.0)), torch.linspace(0.9, 1, 9000) * largest):
        assert assert_same(CODECS[WireFormat.FP8_GROUP], values).isfinite().all()


def test_tq3_is_as_specified() -> None:
    """Bit i is element i; non-zero from half of the scale on; -s, 0 or +s."""
    values = torch.zeros(32)
    values[0], values[1], values[5], values[31] = 2.0, -1.0, 0.99, -2.0
    packet = CODECS[WireFormat.TQ3].encode(values)
    assert packet[:4].view(torch.int32).item() & 0xFFFFFFFF == (1 << 1) | (1 << 31)
    assert packet[128:132].view(torch.int32).item() & 0xFFFFFFFF == 1 | (1 << 1) | (1 << 31)
    assert packet[256:258].view(torch.float16).item() == 2.0
    expected = torch.zeros(32)
    expected[0], expected[1], expected[31] = 2.0, -2.0, -2.0
    assert torch.equal(CODECS[WireFormat.TQ3].decode(packet, 32), expected)


def relative_error(wire: WireFormat, values: torch.Tensor) -> float:
    return float((CODECS[wire].round_trip(values) - values).norm() / values.norm())


def test_errors_of_one_pass() -> None:
    """On normal data; the figures are those of the oracle, so a change of a format shows here."""
    values = torch.randn(1 << 18, generator=torch.Generator().manual_seed(1))
    assert 0.02 < relative_error(WireFormat.FP8, values) < 0.03
    assert 0.02 < relative_error(WireFormat.FP8_GROUP, values) < 0.03
    assert 0.65 < relative_error(WireFormat.TQ3, values) < 0.67
    assert 0.32 < relative_error(WireFormat.HADAMARD2, values) < 0.33
    heavy = torch.distributions.StudentT(3.0).sample((1 << 18,))
    assert relative_error(WireFormat.HADAMARD2, heavy) < 0.8 * relative_error(WireFormat.TQ3, heavy)


@pytest.mark.parametrize(
    "change",
    [{"format": 5}, {"format": _C.WIRE_RAW}, {"format": -1}, {"dtype": 3}, {"count": -1}, {"values": 0}],
    ids=str,
)
def test_bad_calls(change: dict[str, int]) -> None:
    values, packets = torch.zeros(8), torch.zeros(512, dtype=torch.uint8)
    call = {
        "format": _C.WIRE_FP8,
        "dtype": 0,
        "values": values.data_ptr(),
        "count": 8,
        "packets": packets.data_ptr(),
    } | change
    with pytest.raises(RuntimeError, match="invalid argument"):
        _C.encode(**call)
    with pytest.raises(RuntimeError, match="invalid argument"):
        _C.decode(**call)


# A sum whose root mean square lies so near the middle of two floats that torch's root of fp32 takes the other one, and
# so near the border of two levels that this changes the block.
BETWEEN_TWO_LEVELS = """
    -0x1.2ec0f8p+6 -0x1.5c5a58p+2 -0x1.dfb098p+0 -0x1.b5b3dcp+4 0x1.428fc6p+4 0x1.0f8cbcp+4
    0x1.4f858ap+6 -0x1.c8b7aap+5 -0x1.642200p+4 0x1.d96cbcp+3 0x1.2139f6p+3 0x1.31af58p+6
    -0x1.4410e0p+5 -0x1.1fe570p+4 -0x1.1f3e2cp+5 0x1.ad2276p+1 -0x1.64af60p-1 0x1.8dc6bep+2
    -0x1.1fe746p+3 0x1.4380dcp+5 -0x1.3215acp+4 0x1.a5a53ep+5 -0x1.b7619ep+4 -0x1.1f4f42p+4
    0x1.91ff74p+5 -0x1.e5bee4p+4 -0x1.7719a0p+4 -0x1.0f662cp+3 -0x1.1757f4p+5 0x1.10e07cp+2
    -0x1.6a2122p+6 0x1.599ff6p+4
"""


def test_the_root_is_rounded_to_nearest() -> None:
    values = torch.tensor([float.fromhex(word) for word in BETWEEN_TWO_LEVELS.split()])
    assert_same(CODECS[WireFormat.HADAMARD2], values)
