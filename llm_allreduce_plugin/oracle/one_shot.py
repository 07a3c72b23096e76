"""What LOWPRECISION in one step computes, in plain torch: the oracle of csrc/kernels/one_shot_*_fp8.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.oracle.sums import limited


def one_step_sum(inputs: Sequence[torch.Tensor], wire: WireFormat) -> torch.Tensor:
    """The compressed one-shot all-reduce: every rank sums what it decodes of all, its own values too.

    Args:
        inputs: one tensor per rank, alike in shape, dtype and device.
        wire: what travels.

    Returns:
        What every rank gets, like an input.
    """
    codec = CODECS[wire]
    total = torch.zeros(inputs[0].numel(), device=inputs[0].device)
    for part in inputs:
        total = total + codec.round_trip(part.reshape(-1))
    return (limited(total, wire) + 0.0).to(inputs[0].dtype).view(inputs[0].shape)
