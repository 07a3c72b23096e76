"""FP8: 496 e4m3 values and an fp32 scale in 512 bytes; see csrc/codec/fp8.h for what becomes of special values."""

from __future__ import annotations

import torch

MOST_ERROR = 0.05
PACKET_VALUES = 496
PACKET_BYTES = 512
LARGEST = 448.0
LEAST_SCALE = 2.0**-126
_NAN_CODE, _MINUS_ZERO_CODE = 0x7F, 0x80


def codes_of(values: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """Of fp32 values times a multiplier: uint8, NaN for what is not finite.

    448 may come out a little above: e4m3 has nothing between it and NaN, to which torch would round from 464 on.
    """
    finite = values.isfinite()
    scaled = torch.where(finite, values * multiplier, 0.0)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(codes == _MINUS_ZERO_CODE, 0, codes)  # a -0 becomes +0
    return torch.where(finite, codes, _NAN_CODE).to(torch.uint8)


def values_of(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Of uint8 codes, fp32."""
    return codes.contiguous().view(torch.float8_e4m3fn).float() * scale


def scale_of(values: torch.Tensor) -> torch.Tensor:
    """Of fp32 ``[packets, values]``: ``[packets, 1]``."""
    largest = torch.where(values.isfinite(), values.abs(), 0.0).amax(1, keepdim=True)
    # By a tensor: dividing by a number, torch multiplies by its inverse on GPUs.
    return (largest / torch.full_like(largest, LARGEST)).clamp_min(LEAST_SCALE)


def encode(values: torch.Tensor) -> torch.Tensor:
    """Fp32 ``[packets, 496]`` to uint8 ``[packets, 512]``."""
    scale = scale_of(values)
    codes = codes_of(values, 1.0 / scale)
    tail = torch.zeros(values.shape[0], 4, dtype=torch.float32, device=values.device)
    tail[:, :1] = scale
    return torch.cat([codes, tail.view(torch.uint8)], 1)


def decode(packets: torch.Tensor) -> torch.Tensor:
    """Uint8 ``[packets, 512]`` to fp32 ``[packets, 496]``."""
    scale = packets[:, PACKET_VALUES : PACKET_VALUES + 4].contiguous().view(torch.float32)
    return values_of(packets[:, :PACKET_VALUES], scale)
