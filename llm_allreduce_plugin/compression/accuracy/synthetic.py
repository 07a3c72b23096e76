"""Errors of one all-reduce on made data: normal, heavy-tailed, and with the outlier channels that activations have."""

from __future__ import annotations

import dataclasses

import torch

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle.hosts import compressed_host_sum, host_ordered_sum
from llm_allreduce_plugin.oracle.two_shot import compressed_sum, exact_sum

TOKENS, HIDDEN = 128, 4096
OUTLIER_CHANNELS, OUTLIER_SCALE = 8, 60.0


def normal(generator: torch.Generator) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(TOKENS, HIDDEN, generator=generator)


def heavy_tailed(generator: torch.Generator) -> torch.Tensor:
    """Student's t with 3 degrees of freedom."""
    squares = torch.randn(3, TOKENS, HIDDEN, generator=generator).square().mean(0)
    return torch.randn(TOKENS, HIDDEN, generator=generator) / squares.sqrt()


def outliers(generator: torch.Generator) -> torch.Tensor:
    """Normal, with a few channels that are large in every token, as in the residual stream of a transformer."""
    values = torch.randn(TOKENS, HIDDEN, generator=generator)
    values[:, :: HIDDEN // OUTLIER_CHANNELS] *= OUTLIER_SCALE
    return values


DATA = {"normal": normal, "heavy-tailed": heavy_tailed, "outliers": outliers}


@dataclasses.dataclass(frozen=True)
class Error:
    """How far a sum over ranks is from the sum in fp64.

    Attributes:
        wire_format: None for an exact all-reduce, whose only error is the rounding of its result.
        ranks: that were added up.
        data: one of :data:`DATA`.
        relative_l2: norm of the difference over the norm of the sum.
        cosine: between the two.
        relative_max: the largest difference over the largest value.
        hosts: that the ranks are on; with more than one, only what goes between them is compressed.
    """

    wire_format: str | None
    ranks: int
    data: str
    relative_l2: float
    cosine: float
    relative_max: float
    hosts: int = 1


def _sum(parts: list[torch.Tensor], wire: WireFormat | None, hosts: int) -> torch.Tensor:
    if hosts == 1:
        return exact_sum(parts) if wire is None else compressed_sum(parts, wire)
    places = [rank * hosts // len(parts) for rank in range(len(parts))]
    return host_ordered_sum(parts, places) if wire is None else compressed_host_sum(parts, wire, places)


def measure(wire: WireFormat | None, ranks: int, data: str, seed: int = 1, hosts: int = 1) -> Error:
    """One all-reduce of bf16 tensors of ``[128, 4096]``. ``hosts``: as many ranks on each."""
    generator = torch.Generator().manual_seed(seed)
    parts = [DATA[data](generator).bfloat16() for _ in range(ranks)]
    exact = torch.stack(parts).double().sum(0)
    seen = _sum(parts, wire, hosts).double()
    return Error(
        wire_format=None if wire is None else str(wire),
        ranks=ranks,
        data=data,
        relative_l2=float((seen - exact).norm() / exact.norm()),
        cosine=float(torch.nn.functional.cosine_similarity(seen.view(-1), exact.view(-1), dim=0)),
        relative_max=float((seen - exact).abs().max() / exact.abs().max()),
        hosts=hosts,
    )
