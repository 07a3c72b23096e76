"""Graphs as vLLM's passes see them: traced, functional, and after Inductor's own. No code is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._inductor.config as inductor_config
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.fx_passes.pre_grad import pre_grad_passes
from torch._inductor.virtualized import V


class _Pass(CustomGraphPass):  # type: ignore[misc]
    def __init__(self, function: Callable[[fx.Graph], Any]) -> None:
        self.function = function

    def __call__(self, graph: fx.Graph) -> None:
        self.function(graph)

    def uuid(self) -> str:
        return "test"


def traced(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    pass_: Callable[[fx.Graph], Any],
    open_inputs: int,
    before_grad: Callable[[fx.Graph], Any] = lambda graph: None,
) -> Any:
    """What ``function`` returns when it is compiled, with ``pass_`` where vLLM runs its own.

    The first dimension of the first ``open_inputs`` inputs is open, as the number of tokens is. ``before_grad``: where
    vLLM runs its pass on graphs that are not functional yet.
    """
    for tensor in inputs[:open_inputs]:
        torch._dynamo.mark_dynamic(tensor, 0)

    def compile_graph(module: fx.GraphModule, example: Sequence[Any]) -> Any:
        joint_graph_passes(module)
        view_to_reshape(module)
        with inductor_config.patch(post_grad_custom_post_pass=_Pass(pass_)), V.set_fake_mode(detect_fake_mode(example)):
            post_grad_passes(module, is_inference=True)
        return make_boxed_func(module.forward)

    def compile_traced(module: fx.GraphModule, example: Sequence[Any]) -> Any:
        with inductor_config.patch(pre_grad_custom_pass=_Pass(before_grad)):
            module = pre_grad_passes(module, example)
        return backend(module, example)

    torch._dynamo.reset()
    # As vLLM sets it.
    with inductor_config.patch(enable_auto_functionalized_v2=False), torch.inference_mode():
        backend = aot_autograd(
            fw_compiler=compile_graph, inference_compiler=compile_graph, decompositions=select_decomp_table()
        )
        return torch.compile(function, backend=compile_traced, fullgraph=True)(*inputs)
