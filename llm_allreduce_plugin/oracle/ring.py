"""What LOWPRECISION's ring computes, in plain torch: the oracle of csrc/{cpu,kernels}/ring_flags.*."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.oracle.sums import limited, own_values, part_of_values


def ring_sum(inputs: Sequence[torch.Tensor], wire: WireFormat, chunk_packets: int | None = None) -> torch.Tensor:
    """The compressed ring all-reduce: part p starts at rank p, and each rank on its way adds its own values.

    What travels from rank to rank is the sum so far, encoded; the complete sum is rounded once and travels as it is.

    Args:
        inputs: one tensor per rank, alike in shape, dtype and device.
        wire: what the sums travel as.
        chunk_packets: packets that one part after another has, in turns; default: an equal share for each part.

    Returns:
        What every rank gets, like an input.
    """
    codec, world_size = CODECS[wire], len(inputs)
    everyone = torch.stack([part.reshape(-1) for part in inputs])
    count = everyone.shape[1]
    first_rank = part_of_values(count, codec.packet_values, world_size, chunk_packets, everyone.device)
    total = everyone.gather(0, first_rank[None])[0].float()
    for step in range(1, world_size):
        mine = everyone.gather(0, ((first_rank + step) % world_size)[None])[0]
        total = limited(0.0 + codec.round_trip(total) + own_values(mine, wire), wire)
    return (total + 0.0).to(inputs[0].dtype).view(inputs[0].shape)
