"""Our hooks in SGLang's own layers, in one process. ``python -m tests.support.sglang_cases`` prints each case's fault.

Run for any version of SGLang that PYTHONPATH has, with the group of :mod:`tests.support.sglang_stand_in`.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from types import SimpleNamespace
from typing import Any

import torch

from llm_allreduce_plugin.engines.common.fusion_ops import serve
from tests.support.sglang_norm_cases import norm_cases
from tests.support.sglang_stand_in import HIDDEN, Case, Doubled, fusion_attribute, group_of_two, load, tensors

LAYERS = 3


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


def question_case() -> None:
    """SGLang is told that boundaries of any size are fused, but none without rows, and none of other groups."""
    import pkgutil

    from llm_allreduce_plugin.engines.sglang import fusion

    group, communicator = group_of_two()
    ask = pkgutil.resolve_name(fusion._hooks()[0].target)
    assert [ask(rows) for rows in (0, 1, 2048, 100_000)] == [False, True, True, True]
    communicator.no_norm_reason = "rank 1 cannot norm a row"
    assert not ask(1)
    communicator.no_norm_reason = ""
    assert ask(1)
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


def apart_case() -> None:
    """What SGLang's own all-reduce gives where ours cannot run: never the input, which compiled graphs use again.

    Tensors without memory take the way of a GPU's.
    """
    from contextlib import nullcontext

    from llm_allreduce_plugin.engines.common.stock import own_all_reduce
    from llm_allreduce_plugin.engines.sglang.communicator import sum_apart

    group, _ = group_of_two()
    seen: list[str] = []

    class Nccl:
        disabled = False
        available = True

        def change_state(self, *, enable: bool) -> Any:
            assert enable
            return nullcontext()

        def outplace_all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            seen.append("apart")
            assert x.is_contiguous()
            return torch.empty_like(x)

    nccl = Nccl()
    group.__dict__.update(
        qr_comm=None, pymscclpp_comm=None, torch_symm_mem_comm=None, pcie_ipc_comm=None, hpu_communicator=None,
        xpu_communicator=None, npu_communicator=None, flashinfer_comm=None, _fi_workspace_hint=None, pynccl_comm=nccl,
        is_symmetric_memory_enabled=lambda: False,
    )  # fmt: skip
    call = own_all_reduce("SGLang", group, sum_apart, in_place=False)
    x = torch.ones(4, HIDDEN, device="meta")
    assert call(x) is not x
    assert call(x[:, :8]).shape == (4, 8)
    assert seen == ["apart", "apart"]
    nccl.available = False
    assert call(x) is not x
    assert len(seen) == 2, "an NCCL that was not loaded is left alone"


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
        "group, its own all-reduce": apart_case,
        **norm_cases(),
    }
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
