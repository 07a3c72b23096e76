"""FP8_GROUP: e4m3 values and a bf16 scale for each 32, 480 values in 512 bytes; see csrc/codec/fp8_group.h."""

from __future__ import annotations

import torch

from llm_allreduce_plugin.oracle.fp8 import codes_of, scale_of, values_of

MOST_ERROR = 0.05
GROUP_VALUES = 32
PACKET_VALUES = 480
PACKET_BYTES = 512
_UPPER_HALF, _HALF = -(1 << 16), 1 << 15


def encode(values: torch.Tensor) -> torch.Tensor:
    """Fp32 ``[packets, 480]`` to uint8 ``[packets, 512]``."""
    groups = values.reshape(-1, GROUP_VALUES)
    bits = (scale_of(groups).view(torch.int32) + _HALF) & _UPPER_HALF  # to the nearest bf16, halves up
    scale = bits.view(torch.float32)
    codes = codes_of(groups, 1.0 / scale).view(-1, PACKET_VALUES)
    scales = scale.bfloat16().view(-1, PACKET_VALUES // GROUP_VALUES).view(torch.uint8)
    return torch.nn.functional.pad(torch.cat([codes, scales], 1), (0, PACKET_BYTES - PACKET_VALUES - scales.shape[1]))


def decode(packets: torch.Tensor) -> torch.Tensor:
    """Uint8 ``[packets, 512]`` to fp32 ``[packets, 480]``."""
    last = PACKET_VALUES + PACKET_VALUES // GROUP_VALUES * 2
    scale = packets[:, PACKET_VALUES:last].contiguous().view(torch.bfloat16).float().view(-1, 1)
    return values_of(packets[:, :PACKET_VALUES].reshape(-1, GROUP_VALUES), scale).view(-1, PACKET_VALUES)
