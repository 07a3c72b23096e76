"""What the formats of 10 bytes for 32 values share: packets of 32 blocks, in runs of planes and scales."""

from __future__ import annotations

import torch

BLOCK_VALUES = 32
BLOCKS = 32  # of a packet
PACKET_VALUES = BLOCKS * BLOCK_VALUES
PACKET_BYTES = BLOCKS * 10
LARGEST_HALF = 65504.0


def blocks_of(values: torch.Tensor) -> torch.Tensor:
    """Fp32 ``[packets, 1024]`` as ``[blocks, 32]``."""
    return values.reshape(-1, BLOCK_VALUES)


def half_of(scale: torch.Tensor) -> torch.Tensor:
    """Fp32 to fp16; every NaN as 0x7fff."""
    bits = scale.half().view(torch.int16)
    return torch.where(scale.isnan(), 0x7FFF, bits).to(torch.int16).view(torch.float16)


def _plane(bits: torch.Tensor) -> torch.Tensor:
    """Bool ``[blocks, 32]`` to uint8 ``[packets, 128]``: bit i of a little-endian word is element i."""
    weights = 1 << torch.arange(8, device=bits.device)
    words = (bits.view(-1, 4, 8).to(torch.int64) * weights).sum(2)
    return words.to(torch.uint8).view(-1, BLOCKS * 4)


def pack(first: torch.Tensor, second: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Two bool planes ``[blocks, 32]`` and fp16 scales ``[blocks]`` to uint8 ``[packets, 320]``."""
    scales = scale.contiguous().view(-1, BLOCKS).view(torch.uint8)
    return torch.cat([_plane(first), _plane(second), scales], 1)


def unpack(packets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The other way round; the scales as fp32 ``[blocks, 1]``."""

    def plane(begin: int) -> torch.Tensor:
        words = packets[:, begin : begin + BLOCKS * 4].reshape(-1, 4, 1)
        return ((words >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1).bool().reshape(-1, BLOCK_VALUES)

    scale = packets[:, BLOCKS * 8 :].contiguous().view(torch.float16).reshape(-1, 1).float()
    return plane(0), plane(BLOCKS * 4), scale
