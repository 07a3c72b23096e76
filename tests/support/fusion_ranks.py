"""Ranks for tests of the fused operator, without an engine: importing vLLM writes into the environment."""

from __future__ import annotations

import torch

from llm_allreduce_plugin.norm import Normed, Quant
from llm_allreduce_plugin.oracle.norm import residual_rms_norm


class OneRank:
    """A communicator whose sums are its inputs."""

    no_norm_reason = ""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def total(self, input_: torch.Tensor) -> torch.Tensor:
        return input_.clone()

    def all_reduce_residual_rms_norm(
        self,
        input_: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_bias: float = 0.0,
        quant: Quant | None = None,
        return_norm: bool = False,
    ) -> Normed:
        return residual_rms_norm(
            self.total(input_), residual, weight, eps, weight_bias=weight_bias, quant=quant, return_norm=return_norm
        )
