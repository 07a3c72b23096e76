"""TQ3: 32 values of -s, 0 or +s in 10 bytes; see csrc/codec/tq3.h for what becomes of special values."""

from __future__ import annotations

import torch

from llm_allreduce_plugin.oracle.blocks import (
    LARGEST_HALF,
    PACKET_BYTES,
    PACKET_VALUES,
    blocks_of,
    half_of,
    pack,
    unpack,
)

MOST_ERROR = 1.0

__all__ = ["MOST_ERROR", "PACKET_BYTES", "PACKET_VALUES", "decode", "encode"]


def encode(values: torch.Tensor) -> torch.Tensor:
    """Fp32 ``[packets, 1024]`` to uint8 ``[packets, 320]``."""
    blocks = blocks_of(values)
    largest = blocks.abs().amax(1, keepdim=True)  # NaN if there is one
    largest = torch.where(largest.isfinite(), largest.clamp_max(LARGEST_HALF), largest)
    scale = half_of(largest)
    threshold = scale.float() * 0.5
    bad = scale.isnan()
    set_ = ((blocks.abs() >= threshold) & (threshold > 0)) | bad
    negative = set_ & blocks.signbit() & ~bad
    scale = torch.where((threshold > 0) | bad, scale, torch.zeros_like(scale))
    return pack(negative, set_, scale.view(-1))


def decode(packets: torch.Tensor) -> torch.Tensor:
    """Uint8 ``[packets, 320]`` to fp32 ``[packets, 1024]``."""
    negative, set_, scale = unpack(packets)
    size = torch.where(set_, scale, 0.0)
    return torch.where(negative, -size, size).view(-1, PACKET_VALUES)
