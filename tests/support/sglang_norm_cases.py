"""Cases of layer boundaries: SGLang's own norms behind our sum (see :mod:`tests.support.sglang_cases`)."""

from __future__ import annotations

from typing import Any

import torch

from llm_allreduce_plugin.oracle.norm import residual_rms_norm
from tests.support.sglang_stand_in import HIDDEN, Case, group_of_two, tensors


def norm_case(name: str, dtype: torch.dtype, *, attention: bool, more: bool) -> None:
    """A boundary has the bits of our definition, and its inputs stay as they are."""
    from sglang.srt.layers import layernorm

    group, communicator = group_of_two()
    norm = getattr(layernorm, name)(HIDDEN, eps=1e-5).to(dtype)
    weight = torch.randn(HIDDEN).to(dtype)
    norm.weight.data.copy_(weight)
    if name == "GemmaRMSNorm":
        norm.weight.weight_loader(norm.weight, weight)
    x, residual = tensors(5, dtype)
    before = x.clone(), residual.clone()
    addition = torch.randn_like(residual) if more else None
    norm_out, residual_out = norm.forward_with_allreduce_fusion(x, residual, addition, use_attn_tp_group=attention)
    assert communicator.fused == 1
    added = residual if addition is None else residual + addition
    bias = 1.0 if name == "GemmaRMSNorm" else 0.0
    expected = residual_rms_norm(x * 2, added, weight, 1e-5, weight_bias=bias)
    assert torch.equal(norm_out, expected.norm_out), (norm_out, expected.norm_out)
    assert torch.equal(residual_out, expected.residual_out)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    assert group.world_size == 2


def other_norm_case(what: str) -> None:
    """A norm that our kernels do not compute: SGLang's runs behind our sum, and the old residual stays as it is."""
    from sglang.srt.layers.layernorm import RMSNorm

    _, communicator = group_of_two()
    options: dict[str, Any] = {"cast_x_before_out_mul": True} if what == "cast" else {}
    norm = RMSNorm(HIDDEN, eps=1e-5, **options)
    x, residual = tensors(5, torch.bfloat16)
    if what == "cast":
        norm = norm.to(torch.bfloat16)
    before = residual.clone()
    norm_out, residual_out = norm.forward_with_allreduce_fusion(x, residual, use_attn_tp_group=False)
    assert (communicator.fused, communicator.plain) == (0, 1)
    expected = norm.forward(x * 2, residual.clone())
    assert torch.equal(norm_out, expected[0])
    assert torch.equal(residual_out, expected[1])
    assert torch.equal(residual, before)


def compiled_norm_case(name: str) -> None:
    """A boundary in a graph: SGLang's question and the operator, without a break."""
    import pkgutil

    from sglang.srt.layers import layernorm

    from llm_allreduce_plugin.engines.sglang import fusion

    _, communicator = group_of_two()
    norm = getattr(layernorm, name)(HIDDEN, eps=1e-5)
    ask = pkgutil.resolve_name(fusion._hooks()[0].target)

    def boundary(x: torch.Tensor, residual: torch.Tensor) -> Any:
        x = x + 1
        if ask(x.shape[0]):
            return norm.forward_with_allreduce_fusion(x, residual, use_attn_tp_group=False)
        return x, residual

    x, residual = tensors(5, torch.float32)
    compiled = torch.compile(boundary, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 3):
        norm_out, residual_out = compiled(x[:rows], residual[:rows])
        expected = boundary(x[:rows], residual[:rows])
        assert torch.equal(norm_out, expected[0])
        assert torch.equal(residual_out, expected[1])
    assert communicator.fused == 4


def first_norm_case() -> None:
    """Without a residual there is nothing to sum."""
    from sglang.srt.layers.layernorm import RMSNorm

    _, communicator = group_of_two()
    norm = RMSNorm(HIDDEN, eps=1e-5)
    x, _ = tensors(5, torch.float32)
    assert torch.equal(norm.forward_with_allreduce_fusion(x), norm.forward(x))
    assert (communicator.fused, communicator.plain) == (0, 0)


def norm_cases() -> dict[str, Case]:
    """By name."""
    found: dict[str, Case] = {"norm, first": first_norm_case}
    for name in ("RMSNorm", "GemmaRMSNorm"):
        for dtype in (torch.float32, torch.bfloat16):
            for attention in (True, False):
                for more in (True, False):
                    label = (
                        f"norm, {name}, {str(dtype)[6:]}, {'attention' if attention else 'experts'}{', more' * more}"
                    )
                    found[label] = lambda name=name, dtype=dtype, attention=attention, more=more: norm_case(
                        name, dtype, attention=attention, more=more
                    )
        found[f"norm, compiled, {name}"] = lambda name=name: compiled_norm_case(name)
    for what in ("cast", "types"):
        found[f"norm, other, {what}"] = lambda what=what: other_norm_case(what)
    return found
