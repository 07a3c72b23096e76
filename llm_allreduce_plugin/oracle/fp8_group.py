"""FP8_GROUP: e4m3 values and a power of two for each 32, 480 values in 512 bytes; see csrc/codec/fp8_group.h."""

from __future__ import annotations

import torch

from llm_allreduce_plugin.oracle.fp8 import codes_of, values_of

MOST_ERROR = 0.05
GROUP_VALUES = 32
GROUPS = 15
PACKET_VALUES = GROUPS * GROUP_VALUES
PACKET_BYTES = 512
_BIAS, _MANTISSA_BITS = 127, 23  # of fp32
_ROUNDS_UP = 0x7FFFFF - 0x600000  # 448 is 1.75 times a power of two
_LARGEST_EXPONENT = 247
_MULTIPLIER_OF_LARGEST = 2.0**-120 * 31 / 32
_EXPONENT_BYTES = [PACKET_VALUES + group + (8 if group >= 8 else 0) for group in range(GROUPS)]  # noqa: PLR2004


def encode(values: torch.Tensor) -> torch.Tensor:
    """Fp32 ``[packets, 480]`` to uint8 ``[packets, 512]``."""
    groups = values.reshape(-1, GROUP_VALUES)
    largest = torch.where(groups.isfinite(), groups.abs(), 0.0).amax(1, keepdim=True)
    # 448 has the exponent 8.
    exponent = (((largest.view(torch.int32) + _ROUNDS_UP) >> _MANTISSA_BITS) - 8).clamp_min(1)
    inverse = ((2 * _BIAS - exponent) << _MANTISSA_BITS).view(torch.float32)
    multiplier = torch.where(exponent < _LARGEST_EXPONENT, inverse, _MULTIPLIER_OF_LARGEST)
    packets = torch.zeros(values.shape[0], PACKET_BYTES, dtype=torch.uint8, device=values.device)
    packets[:, :PACKET_VALUES] = codes_of(groups, multiplier).view(-1, PACKET_VALUES)
    packets[:, _EXPONENT_BYTES] = exponent.to(torch.uint8).view(-1, GROUPS)
    return packets


def decode(packets: torch.Tensor) -> torch.Tensor:
    """Uint8 ``[packets, 512]`` to fp32 ``[packets, 480]``."""
    exponent = packets[:, _EXPONENT_BYTES].to(torch.int32).view(-1, 1)
    codes = packets[:, :PACKET_VALUES].reshape(-1, GROUP_VALUES)
    return values_of(codes, (exponent << _MANTISSA_BITS).view(torch.float32)).view(-1, PACKET_VALUES)
