"""The rank-ordered reference, and inputs that every rank can make for every other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIB = 1 << 20
MAGNITUDES = 4099  # a prime: chunks, parts and rows have other lengths
SIZES = (0, 1, 7, 8, 9, 1023, MIB - 1, MIB, MIB + 1)

_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def fresh_seed() -> int:
    """Another one in every run; failures name it."""
    return int.from_bytes(os.urandom(4), "little")


def rank_input(seed: int, rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Rank ``rank``'s input on the CPU: normal values over a few orders of magnitude, so that rounding shows.

    The magnitudes come again after MAGNITUDES elements: they take twice as long to make as the values.
    """
    generator = torch.Generator().manual_seed(seed * 31 + rank)
    values = torch.randn(count, generator=generator)
    magnitudes = torch.exp2(torch.randint(-6, 7, (min(count, MAGNITUDES),), generator=generator).float())
    whole = count - count % MAGNITUDES
    values[:whole].view(-1, MAGNITUDES).mul_(magnitudes if whole else 1.0)
    values[whole:].mul_(magnitudes[: count - whole])
    return values.to(dtype)


def special_inputs(world_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """One tensor per rank; element by element, every combination of special values on ranks 0 and 1, among zeros."""
    info = torch.finfo(dtype)
    values = torch.tensor(
        [
            0.0,
            -0.0,
            1.0,
            -1.0,
            info.max,
            -info.max,
            info.smallest_normal,
            info.smallest_normal / 4,
            -info.smallest_normal / 4,
        ]
        + [float("inf"), float("-inf"), float("nan"), info.eps],
        dtype=torch.float64,
    ).to(dtype)
    count = len(values)
    inputs = [torch.full((count * count,), -0.0, dtype=dtype) for _ in range(world_size)]
    inputs[0] = values.repeat_interleave(count)
    inputs[-1] = values.repeat(count)
    return inputs


def rank_ordered_sum(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp32, ranks 0..N-1 in order, from +0, rounded once."""
    total = torch.zeros(inputs[0].shape, dtype=torch.float32)
    for part in inputs:
        total += part.to(torch.float32)
    return total.to(inputs[0].dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_BITS[tensor.dtype])


def digest(tensor: torch.Tensor) -> str:
    """Equal exactly when all bits are."""
    return hashlib.sha256(bits(tensor.cpu()).numpy().tobytes()).hexdigest()


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Bit equality; where the reference has a NaN, any NaN will do (platforms differ in its payload)."""
    actual = actual.detach().cpu()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    if torch.equal(bits(actual), bits(expected)):  # a tenth of what it takes to say where they differ
        return
    wrong = (bits(actual) != bits(expected)).reshape(expected.shape) & ~(actual.isnan() & expected.isnan())
    if wrong.any():
        first = int(wrong.flatten().nonzero()[0])
        got, want = actual.flatten()[first].item(), expected.flatten()[first].item()
        count = f"{int(wrong.sum())} of {wrong.numel()} elements differ"
        message = f"{what}: {count}, first at {first}: {got!r}, expected {want!r}"
        raise AssertionError(message)


def poison(tensor: torch.Tensor, byte: int = 0xA5) -> torch.Tensor:
    """Fill with bits that no sum of these inputs has, so that an element nobody wrote shows.

    ``byte``: 0x7f is the largest of fp32, or nearly: among values that share a scale it shows, too.
    """
    if tensor.numel():
        tensor.view(torch.uint8).fill_(byte)
    return tensor
