"""HADAMARD2: 32 values, rotated, in four levels, in 10 bytes; see csrc/codec/hadamard2.h for special values."""

from __future__ import annotations

import torch

from llm_allreduce_plugin.oracle.blocks import (
    BLOCK_VALUES,
    LARGEST_HALF,
    PACKET_BYTES,
    PACKET_VALUES,
    blocks_of,
    half_of,
    pack,
    unpack,
)

MOST_ERROR = 0.5

__all__ = ["MOST_ERROR", "PACKET_BYTES", "PACKET_VALUES", "decode", "encode"]

LARGEST_INPUT = 2.0**20


def _constant(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


SMALL, LARGE, APART = _constant(0.4527800), _constant(1.5104176), _constant(0.9815988)
INVERSE_ROOT_32 = _constant(0.17677669)


def _rotate(blocks: torch.Tensor) -> torch.Tensor:
    """The Hadamard matrix of order 32 over its root, in the kernels' order of operations."""
    half = 1
    while half < BLOCK_VALUES:
        pairs = blocks.view(-1, BLOCK_VALUES // (2 * half), 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        blocks = torch.stack([a + b, a - b], 2).view(-1, BLOCK_VALUES)
        half *= 2
    return blocks * INVERSE_ROOT_32


def _sum(terms: torch.Tensor) -> torch.Tensor:
    """Over the elements of each block, one after another."""
    total = torch.zeros(terms.shape[0], 1, device=terms.device)
    for i in range(BLOCK_VALUES):
        total = total + terms[:, i : i + 1]
    return total


def encode(values: torch.Tensor) -> torch.Tensor:
    """Fp32 ``[packets, 1024]`` to uint8 ``[packets, 320]``."""
    blocks = blocks_of(values)
    bad = ~blocks.isfinite().all(1, keepdim=True)
    rotated = _rotate(torch.where(bad, 0.0, blocks).clamp(-LARGEST_INPUT, LARGEST_INPUT))
    # Torch's root of fp32 may be one unit off the kernels', which is rounded to nearest; that of fp64 is near enough.
    scale = (_sum(rotated * rotated) * (1.0 / BLOCK_VALUES)).double().sqrt().float()
    large = torch.zeros_like(rotated, dtype=torch.bool)
    for _ in range(2):
        large = rotated.abs() > scale * APART
        level = torch.where(large, LARGE, SMALL)
        scale = _sum(rotated.abs() * level) / _sum(level * level)
    half = half_of(torch.where(bad, float("nan"), scale.clamp_max(LARGEST_HALF)))
    return pack(rotated.signbit() & ~bad, large & ~bad, half.view(-1))


def decode(packets: torch.Tensor) -> torch.Tensor:
    """Uint8 ``[packets, 320]`` to fp32 ``[packets, 1024]``."""
    negative, large, scale = unpack(packets)
    size = torch.where(large, scale * LARGE, scale * SMALL)
    return _rotate(torch.where(negative, -size, size)).view(-1, PACKET_VALUES)
