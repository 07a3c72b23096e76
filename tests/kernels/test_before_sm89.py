"""FP8 on GPUs that have no conversions for it: every code, and every value at which rounding changes."""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm_allreduce_plugin.oracle.norm import e4m3
from tests.support.emulator import COMPILER, EMULATOR, FLAGS, SOURCES, needs_emulator, toolkit_headers

pytestmark = needs_emulator


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    made = tmp_path_factory.mktemp("before_sm89") / "codec.so"
    includes = [f"-I{folder}" for folder in (EMULATOR, SOURCES, SOURCES / "include", toolkit_headers())]
    source = Path(__file__).with_name("before_sm89.cpp")
    command = [COMPILER, *FLAGS, "-fvisibility=default", "-O1", *includes, "-shared", str(source), "-o", str(made)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(made))


def called(function: Callable[..., None], values: torch.Tensor, factor: float, out: torch.Tensor) -> torch.Tensor:
    count = max(values.numel(), out.numel())
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, out)]
    function(addresses[0], ctypes.c_int64(count), ctypes.c_float(factor), addresses[1])
    return out


def patterns() -> torch.Tensor:
    """fp32 of every exponent: the upper 16 bits all there are, the lower ones on, beside and between two bf16."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    lower = torch.tensor((0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF), dtype=torch.int32)
    return (upper[:, None] | lower).flatten().view(torch.float32)


def expected_codes(values: torch.Tensor, multiplier: float) -> torch.Tensor:
    """e4m3 of finite products, no zero of which is negative; NaN for what was not finite."""
    codes = e4m3(values * multiplier).view(torch.uint8)
    codes = torch.where(codes == 0x80, torch.zeros_like(codes), codes)
    return torch.where(values.isfinite(), codes, torch.full_like(codes, 0x7F))


@pytest.mark.parametrize("multiplier", [1.0, 0.37, 3e-5, 2.0**20])
def test_encodes(library: ctypes.CDLL, multiplier: float) -> None:
    values = patterns()
    codes = called(library.encode, values, multiplier, torch.full((values.numel(),), 0xA5, dtype=torch.uint8))
    assert torch.equal(codes, expected_codes(values, multiplier))


def test_ties_and_their_neighbours(library: ctypes.CDLL) -> None:
    """The middle of every two codes goes to the even one; one step of fp32 off, to the nearer."""
    codes = torch.arange(0x7F, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    middle = (values[:-1] + values[1:]) / 2
    even = torch.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
    for sign in (1, -1):
        for value, wanted in (
            (middle, even),
            (middle.nextafter(torch.tensor(0.0)), codes[:-1]),
            (middle.nextafter(torch.tensor(math.inf)), codes[1:]),
        ):
            signed = torch.where((wanted != 0) & (sign < 0), wanted + 0x80, wanted)
            padded = torch.nn.functional.pad(value * sign, (0, -value.numel() % 4))
            seen = called(library.encode, padded, 1.0, torch.full((padded.numel(),), 0xA5, dtype=torch.uint8))
            assert torch.equal(seen[: value.numel()], signed)


@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-126, 3.4e38 / 448])
def test_decodes(library: ctypes.CDLL, scale: float) -> None:
    """Every pair of codes."""
    pairs = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    codes = pairs.view(torch.uint8)
    values = called(library.decode, pairs, scale, torch.full((codes.numel(),), 7.0))
    expected = codes.view(torch.float8_e4m3fn).float() * torch.tensor(scale)
    assert torch.equal(values.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(values[numbers].view(torch.int32), expected[numbers].view(torch.int32))
