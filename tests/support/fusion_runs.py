"""Graphs with our pass among Inductor's, on two ranks that have the same to add. See ``fusion_cases.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.compilation.passes.ir.inplace_functionalization import VllmIRInplaceFunctionalizationPass
from vllm.config import VllmConfig
from vllm.config.utils import Range
from vllm.distributed import parallel_state

from llm_allreduce_plugin.engines.common import fusion, fusion_ops
from llm_allreduce_plugin.engines.vllm.fusion import is_all_reduce
from tests.support.fusion_ranks import OneRank
from tests.support.fusion_spellings import GROUP
from tests.support.post_grad import traced

Output = Any


class TwoRanks(OneRank):
    """A communicator of two ranks that always have the same to add, and vLLM's group of them."""

    def total(self, input_: torch.Tensor) -> torch.Tensor:
        return input_ + input_

    def _all_reduce_out_place(self, input_: torch.Tensor) -> torch.Tensor:
        return self.total(input_)


RANKS = TwoRanks()


def make_inputs(dtype: torch.dtype, hidden: int, rows: int = 6) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x, residual = torch.randn(rows, hidden, dtype=dtype), torch.randn(rows, hidden, dtype=dtype)
    return x, residual, torch.randn(hidden, dtype=dtype), torch.tensor([0.25])


@functools.cache
def functional_pass() -> Any:
    """vLLM's own, without which operators that may work in place stay what they are."""
    return VllmIRInplaceFunctionalizationPass(VllmConfig())


def run(model: Callable[..., Any], inputs: Any) -> tuple[fusion.Fused, list[torch.Tensor], str]:
    """What was fused, what the graph then gives, and the graph."""
    done: list[fusion.Fused] = []
    text: list[str] = []

    def pass_(graph: torch.fx.Graph) -> None:
        done.append(fusion.fuse(graph, is_all_reduce))
        text.append(str(graph))

    with pass_context(Range(1, 8192)):
        outputs = traced(model, inputs, pass_, 2, functional_pass())
    return done[0], outputs, text[0]


def same(got: torch.Tensor, want: torch.Tensor, where: str) -> None:
    """Bit for bit. Scales of NVFP4 are bytes under several names."""
    one, other = (
        torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(torch.uint8) for tensor in (got, want)
    )
    assert torch.equal(one, other), f"{got} is not {want}: {where}"


def same_layout(got: torch.Tensor, want: torch.Tensor, where: str) -> None:
    """What takes the place of a tensor must lie as that did: kernels behind it rely on it."""
    layouts = [(tensor.dtype, tuple(tensor.shape), tensor.stride()) for tensor in (got, want)]
    assert layouts[0] == layouts[1], f"{layouts[0]} is not {layouts[1]}: {where}"


def serve_groups() -> None:
    """A group of ours, and one of vLLM's alone."""
    fusion_ops.register_operator()
    for name in (GROUP, "ep:0"):
        parallel_state._groups[name] = lambda: RANKS  # type: ignore[assignment,return-value]
    fusion_ops.serve(GROUP, RANKS)  # type: ignore[arg-type]
