"""The rank-ordered reference, and inputs that every rank can make for every other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from llm_allreduce_plugin.codecs import CODECS
from llm_allreduce_plugin.config import WireFormat

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIB = 1 << 20
SIZES = (0, 1, 7, 8, 9, 1023, MIB - 1, MIB, MIB + 1)

_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def rank_input(seed: int, rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Rank ``rank``'s input on the CPU: normal values over a few orders of magnitude, so that rounding shows."""
    generator = torch.Generator().manual_seed(seed * 31 + rank)
    values = torch.randn(count, generator=generator)
    return (values * torch.exp2(torch.randint(-6, 7, (count,), generator=generator).float())).to(dtype)


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


def low_precision_sum(inputs: Sequence[torch.Tensor], wire: WireFormat, chunk_packets: int) -> torch.Tensor:
    """What LOWPRECISION gives: owners add what they decode to their own values, in rank order, and all decode the sum.

    ``chunk_packets``: packets that one owner after another has; the last owner's are followed by the first's again.
    """
    codec, world_size, count = CODECS[wire], len(inputs), inputs[0].numel()
    packets = -(-count // codec.packet_values)
    owners = (torch.arange(packets) // chunk_packets % world_size).repeat_interleave(codec.packet_values)[:count]
    infinity_travels = wire is WireFormat.TQ3
    total = torch.zeros(count)
    for rank, part in enumerate(inputs):
        exact = part.float()
        if not infinity_travels:
            exact = torch.where(exact.isfinite(), exact, float("nan"))
        total = total + torch.where(owners == rank, exact, codec.round_trip(part))
    if not infinity_travels:
        largest = torch.finfo(torch.float32).max
        total = torch.where(total.isinf(), total.sign() * largest, total)
    return (codec.round_trip(total) + 0.0).to(inputs[0].dtype)


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
    wrong = (bits(actual) != bits(expected)).reshape(expected.shape) & ~(actual.isnan() & expected.isnan())
    if wrong.any():
        first = int(wrong.flatten().nonzero()[0])
        got, want = actual.flatten()[first].item(), expected.flatten()[first].item()
        count = f"{int(wrong.sum())} of {wrong.numel()} elements differ"
        message = f"{what}: {count}, first at {first}: {got!r}, expected {want!r}"
        raise AssertionError(message)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with bits that no sum of these inputs has, so that an element nobody wrote shows."""
    if tensor.numel():
        tensor.view(torch.uint8).fill_(0xA5)
    return tensor
