"""Our hooks in SGLang's own layers, in one process. ``python -m tests.support.sglang_cases`` prints each case's fault.

Run for any version of SGLang that PYTHONPATH has. The group is a stand-in whose two ranks hold the same parts: the sum
of a part is twice the part. Everything else is SGLang's: norms, layers, models, and the questions that it asks.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # which is read when SGLang is imported

import torch

from llm_allreduce_plugin.engines.common.fusion_ops import serve
from llm_allreduce_plugin.norm import Normed
from llm_allreduce_plugin.oracle.norm import residual_rms_norm
from tests.support.fusion_ranks import OneRank

HIDDEN = 64
LAYERS = 3
Case = Callable[[], None]


class Doubled(OneRank):
    """The communicator of the stand-in, which counts fused calls."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__(rank=1)
        self.fused = 0
        self.plain = 0

    def total(self, input_: torch.Tensor) -> torch.Tensor:
        return input_ * 2

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        self.plain += 1
        return self.total(input_)

    def all_reduce_residual_rms_norm(self, *args: Any, **kwargs: Any) -> Normed:
        self.fused += 1
        return super().all_reduce_residual_rms_norm(*args, **kwargs)


def load() -> str:
    """SGLang with our hooks in it; its version."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # Versions differ in which models transformers already has.
    register = CONFIG_MAPPING.register
    CONFIG_MAPPING.register = lambda key, value, exist_ok=False: register(key, value, exist_ok=True)
    import sglang
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import get_context
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    from llm_allreduce_plugin.engines.sglang import fusion, hooks, plugin

    assert hooks.not_applied(plugin.our_hooks()) == []
    assert fusion._installed() is None, fusion._installed()
    arguments = ServerArgs(model_path="dummy", device="cpu")
    if hasattr(arguments, "resolve_once"):
        arguments.resolve_once()
    get_context().set_server_args(arguments)
    return str(sglang.__version__)


def fusion_attribute() -> str:
    """Of a group: where our communicator is."""
    from llm_allreduce_plugin.engines.sglang.boundaries import ATTRIBUTE

    return ATTRIBUTE


def group_of_two() -> tuple[Any, Doubled]:
    """SGLang's own class of groups, without the making of one, in the place of its tensor-parallel groups."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import get_parallel

    group = parallel_state.GroupCoordinator.__new__(parallel_state.GroupCoordinator)
    group.__dict__.update(
        unique_name="tp:0", ranks=[0, 1], rank=0, rank_in_group=0, world_size=2, device=torch.device("cpu"),
        local_size=0, device_group=None, cpu_group=None, pynccl_comm=None, ca_comm=None,
    )  # fmt: skip
    communicator = Doubled()
    setattr(group, fusion_attribute(), communicator)
    serve(group.unique_name, communicator)
    one = SimpleNamespace(ranks=[0], world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)
    for name in ("_TP", "_ATTN_TP", "_MOE_TP"):
        setattr(parallel_state, name, group)
    for name in ("_PP", "_MOE_EP", "_ATTN_CP", "_MOE_DP", "_WORLD"):
        setattr(parallel_state, name, one)
    values = {
        "tp_size": 2, "tp_rank": 0, "tp_group": group, "attn_tp_size": 2, "attn_tp_rank": 0, "attn_tp_group": group,
        "moe_tp_size": 2, "moe_tp_rank": 0, "moe_tp_group": group,
        "moe_ep_size": 1, "moe_ep_rank": 0, "moe_ep_group": one,
        "pp_group": one, "pp_size": 1, "pp_rank": 0, "moe_dp_size": 1, "attn_cp_size": 1, "attn_dp_size": 1,
    }  # fmt: skip
    get_parallel()._overrides.update(values)
    return group, communicator


def tensors(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows)
    return torch.randn(rows, HIDDEN).to(dtype), torch.randn(rows, HIDDEN).to(dtype)


def arguments_case() -> None:
    """Our flags among SGLang's; bad settings are refused while it looks at its own; FlashInfer's fusion goes off."""
    from sglang.srt.server_args import prepare_server_args

    from llm_allreduce_plugin.errors import ConfigError

    def resolved(*words: str) -> Any:
        arguments = prepare_server_args(["--model-path", "dummy", "--device", "cpu", "--tp-size", "2", *words])
        if hasattr(arguments, "resolve_once"):
            arguments.resolve_once()
        return arguments

    for strategy, off in (("twoshot", True), ("nccl", False)):
        given = resolved("--allreduce-strategy", strategy, "--allreduce-config", '{"timeout_s": 5}')
        assert given.enforce_disable_flashinfer_allreduce_fusion is off
        assert os.environ["LLM_ALLREDUCE_STRATEGY"] == strategy.upper()
        assert os.environ["LLM_ALLREDUCE_TIMEOUT_S"] == "5.0"
    try:
        resolved("--json-model-override-args", '{"llm_allreduce": {"timeout": 3}}')
    except ConfigError as error:
        assert "SGLang json_model_override_args: timeout=3: unknown key" in str(error)
    else:
        message = "a bad setting was taken"
        raise AssertionError(message)


# -- norms -------------------------------------------------------------------------------------------------------------


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


def question_case() -> None:
    """SGLang is told that boundaries of any size are fused, but none without rows, and none of other groups."""
    import pkgutil

    from llm_allreduce_plugin.engines.sglang import fusion

    group, _ = group_of_two()
    ask = pkgutil.resolve_name(fusion._hooks()[0].target)
    assert [ask(rows) for rows in (0, 1, 2048, 100_000)] == [False, True, True, True]
    delattr(group, fusion_attribute())
    assert not ask(1)


def parts_case(what: str) -> None:
    """What is said of arguments is what layers are told, where experts or attention sum over parts of the group."""
    import pkgutil

    from sglang.srt.runtime_context import get_parallel

    from llm_allreduce_plugin import AllReduceConfig
    from llm_allreduce_plugin.engines.sglang import fusion

    group, _ = group_of_two()
    group.ranks, group.world_size = [0, 1, 2, 3], 4
    part = SimpleNamespace(ranks=[0, 2], world_size=2, rank_in_group=0, unique_name="part:0")
    here: dict[str, Any] = {"tp_size": 4, "attn_tp_size": 4, "moe_tp_size": 4}
    if what == "attn_cp_size":
        here |= {"attn_cp_size": 2, "attn_tp_size": 2, "attn_tp_group": part}
    else:
        here |= {"moe_tp_size": 2, "moe_tp_group": part}
        here |= {"moe_ep_size": 2, "moe_ep_group": part} if what == "ep_size" else {"moe_dp_size": 2}
    ask = pkgutil.resolve_name(fusion._hooks()[0].target)
    reason = fusion.prepare(SimpleNamespace(tp_size=4, **{what: 2}), AllReduceConfig())
    with get_parallel().override(**here):
        assert ask(1) is (reason is None), reason
    from sglang.srt.layers.moe import utils

    merges = what == "ep_size" and hasattr(utils, "post_experts_reduction_group")
    assert (reason is None) is merges


def second_group_case() -> None:
    """PD-multiplexing puts a second group in the tensor-parallel one's place: boundaries go there, too."""
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.runtime_context import get_parallel

    group, first = group_of_two()
    with get_parallel().override(tp_group=(second := copy.copy(group))):
        second.unique_name = "pdmux_prefill_tp:0"
        communicator = Doubled()
        setattr(second, fusion_attribute(), communicator)
        serve(second.unique_name, communicator)
        norm = RMSNorm(HIDDEN, eps=1e-5)
        for attention in (True, False):
            norm.forward_with_allreduce_fusion(*tensors(5, torch.float32), use_attn_tp_group=attention)
    assert (first.fused, communicator.fused) == (0, 2)


# -- groups ------------------------------------------------------------------------------------------------------------


def group_case() -> None:
    """An all-reduce of the group runs on its communicator, eager and compiled, which is closed once."""
    group, communicator = group_of_two()
    x = torch.randn(3, HIDDEN)
    before = x.clone()
    assert torch.equal(group.all_reduce(x), x * 2)
    assert communicator.plain == 1
    compiled = torch.compile(lambda x: group.all_reduce(x + 1), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), (x + 1) * 2)
    assert communicator.plain == 2
    assert torch.equal(x, before)
    closed = []
    communicator.close = lambda: closed.append(True)  # type: ignore[attr-defined]
    from llm_allreduce_plugin.engines.sglang.communicator import close

    close(group)
    close(group)
    assert closed == [True]
    assert not hasattr(group, fusion_attribute())


# -- models ------------------------------------------------------------------------------------------------------------


class MixedValues(torch.nn.Module):
    """In attention's place: every query's head gets a mean of the values of its row."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _batch: object) -> torch.Tensor:
        return q * 0.5 + v.repeat(1, q.shape[1] // v.shape[1]) + k.mean()


def model_case(module: str, *, capture: bool) -> None:
    """A dense model gives what it gave without fusion; every sum but the last one goes to the norm behind it."""
    import importlib

    from transformers import LlamaConfig, Qwen2Config

    group, communicator = group_of_two()
    config = (LlamaConfig if module == "llama" else Qwen2Config)(
        vocab_size=128, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(3)
    models = importlib.import_module(f"sglang.srt.models.{module}")
    model = (models.LlamaModel if module == "llama" else models.Qwen2Model)(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    for layer in model.layers:
        layer.self_attn.attn = MixedValues()
    if capture:
        model.layers_to_capture = [1, 2]
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: True, is_decode=lambda: False))
    ids, positions = torch.arange(6), torch.arange(6)
    fused = model(ids, positions, batch)
    counts = communicator.fused, communicator.plain
    delattr(group, fusion_attribute())
    type(group).all_reduce, hooked = (lambda _group, x: x * 2), type(group).all_reduce
    try:
        plain = model(ids, positions, batch)
    finally:
        type(group).all_reduce = hooked
    fused, plain = ((*out[1], out[0]) if isinstance(out, tuple) else (out,) for out in (fused, plain))
    assert len(fused) == len(plain) == (3 if capture else 1)
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # Sums that a captured state needs are made at once; the first one is the embedding's.
    assert counts == ((LAYERS, LAYERS + 1) if capture else (2 * LAYERS - 1, 2)), counts


def cases() -> dict[str, Case]:
    from llm_allreduce_plugin.engines.sglang import dense_layers

    found: dict[str, Case] = {
        "arguments": arguments_case,
        "question": question_case,
        **{
            f"question, {what}": lambda what=what: parts_case(what)
            for what in ("ep_size", "moe_dp_size", "attn_cp_size")
        },
        "group": group_case,
        "group, second": second_group_case,
        "norm, first": first_norm_case,
    }
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
    for hook in dense_layers.our_hooks():
        if hook.kind == "AROUND":
            module = hook.target.split(".")[3]
            for capture in (False, True):
                found[f"model, {module}{', captured' * capture}"] = lambda module=module, capture=capture: model_case(
                    module, capture=capture
                )
    return found


def main() -> None:
    version = load()
    faults: dict[str, str | None] = {}
    for name, case in cases().items():
        try:
            with torch.no_grad():
                case()
            faults[name] = None
        except Exception:
            faults[name] = traceback.format_exc()[-1500:]
    sys.stdout.write(json.dumps({"version": version, "faults": faults}) + "\n")


if __name__ == "__main__":
    main()
