"""Whose fusion a layer boundary of SGLang gets, by its arguments and hooks, and what the log says; without SGLang."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from llm_allreduce_plugin.engines.sglang import fusion, hooks, own_kernels, plugin
from llm_allreduce_plugin.engines.sglang.fusion import prepare
from llm_allreduce_plugin.engines.sglang.settings import settings_of
from tests.support.sglang_arguments import server_args

pytestmark = pytest.mark.usefixtures("no_sglang_settings", "sglang_hooked")


def test_ours_replaces_what_flashinfer_would_fuse() -> None:
    arguments = server_args(moe_a2a_backend="none", attn_dp_size=1)
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is True
    assert prepare(arguments, settings_of(arguments)) is None


@pytest.mark.parametrize(
    "field", [{"flashinfer_allreduce_fusion_backend": "auto"}, {"enable_flashinfer_allreduce_fusion": True}]
)
def test_flashinfers_fusion_by_name(field: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    arguments = server_args(flashinfer_allreduce_fusion_backend=None) if not field else server_args(**field)
    assert "--flashinfer-allreduce-fusion-backend was given" in str(prepare(arguments, settings_of(arguments)))
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False, "the user's wish stays"
    arguments = server_args({"allreduce_strategy": "ONESHOT"}, **field)
    with caplog.at_level("WARNING", logger="llm_allreduce_plugin"):
        plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is True
    assert "--flashinfer-allreduce-fusion-backend is ignored: allreduce_strategy ONESHOT was set" in caplog.text


def test_a_user_who_turns_flashinfers_fusion_off_has_ours() -> None:
    arguments = server_args(
        enforce_disable_flashinfer_allreduce_fusion=True, flashinfer_allreduce_fusion_backend="auto"
    )
    assert prepare(arguments, settings_of(arguments)) is None


@pytest.mark.parametrize(
    ("override", "fields", "text"),
    [
        ({"llm_allreduce": {"fuse_norm": False}}, {}, "fuse_norm is off"),
        ({}, {"enable_deterministic_inference": True}, "deterministic"),
        ({}, {"enable_dp_attention": True}, "data parallel"),
        ({}, {"attn_dp_size": 2}, "data parallel"),
        ({}, {"moe_a2a_backend": "deepep"}, "--moe-a2a-backend deepep"),
        ({}, {"tp": 4, "ep_size": 2}, "experts are split over 2 of 4 ranks"),
        ({}, {"tp": 4, "moe_dp_size": 2}, "experts run data parallel"),
        ({}, {"tp": 4, "moe_dp_size": 2, "ep_size": 2}, "experts run data parallel"),
        ({}, {"tp": 4, "attn_cp_size": 2}, "attention is split by context"),
        ({}, {"attn_cp_size": 2}, "attention is split by context"),
    ],
)
def test_where_ours_does_not_fuse_nothing_is_taken_away(override: Any, fields: dict[str, Any], text: str) -> None:
    arguments = server_args(override, **fields)
    assert text in str(prepare(arguments, settings_of(arguments)))
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False


@pytest.mark.parametrize(
    "fields", [{"ep_size": 1}, {"ep_size": 4}, {"ep_size": 4, "moe_dp_size": 1, "attn_cp_size": 1}]
)
def test_experts_that_sum_over_the_whole_group_are_fused(fields: dict[str, Any]) -> None:
    arguments = server_args(tp=4, **fields)
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is True
    assert prepare(arguments, settings_of(arguments)) is None


def test_newer_versions_sum_experts_that_are_split_both_ways_over_the_whole_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merged = "sglang.srt.layers.moe.utils.post_experts_reduction_group"
    monkeypatch.setattr(hooks, "exists", lambda target: target == merged)
    arguments = server_args(tp=4, ep_size=2)
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is True
    assert prepare(arguments, settings_of(arguments)) is None
    assert "experts run data parallel" in str(
        prepare(server_args(tp=4, ep_size=2, moe_dp_size=2), settings_of(arguments))
    )


def test_without_hooks_at_boundaries_nothing_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "_installed", lambda: "this SGLang has no place")
    arguments = server_args({"allreduce_strategy": "ONESHOT"}, flashinfer_allreduce_fusion_backend="auto")
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False
    assert prepare(arguments, settings_of(arguments)) == "this SGLang has no place"


def test_without_hooks_at_groups_nothing_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups then keep SGLang's own all-reduce (``communicator.equip``)."""
    monkeypatch.setattr(hooks, "not_applied", lambda asked: [hook.target for hook in asked])
    arguments = server_args()
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False


def test_a_fusion_that_stays_is_not_called_ignored(caplog: pytest.LogCaptureFixture) -> None:
    arguments = server_args(
        {"allreduce_strategy": "ONESHOT"}, tp=4, attn_cp_size=2, flashinfer_allreduce_fusion_backend="auto"
    )
    with caplog.at_level("INFO", logger="llm_allreduce_plugin"):
        plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False
    assert caplog.records == []


def said_of_fusion(arguments: Any, caplog: pytest.LogCaptureFixture, *, talks: bool = True) -> list[str]:
    """What a rank logs, whose logger is set up by then: the first process's is not when arguments are checked."""
    for said in (fusion._say_kept_off, fusion._say_not_fused):
        said.cache_clear()
    plugin.check_arguments(arguments)
    caplog.clear()
    with caplog.at_level("INFO", logger="llm_allreduce_plugin"):
        for _group in range(2):
            fusion.install(arguments, settings_of(arguments), talks=talks)
    return [record.getMessage() for record in caplog.records]


def test_that_flashinfers_fusion_is_off_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    assert said_of_fusion(server_args(), caplog) == [
        "all-reduce fusion: FlashInfer's is off, whose kernel would bypass allreduce_strategy: this plugin fuses the "
        "same layer boundaries"
    ]
    assert said_of_fusion(server_args(), caplog, talks=False) == []


def test_where_ours_does_not_fuse_the_log_says_what_stays(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = said_of_fusion(server_args(tp=4, ep_size=2), caplog)
    assert line.startswith("all-reduce fusion: layer boundaries are not fused: experts are split over 2 of 4 ranks")
    assert line.endswith("; where SGLang fuses them itself, those all-reduces bypass allreduce_strategy")


def test_kernels_of_a_model_are_named_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    own_kernels._say_once.cache_clear()
    monkeypatch.setitem(sys.modules, "sglang.kernels.ops.kimi_k3.all_reduce", SimpleNamespace(_COMM_MAP={}))
    with caplog.at_level("INFO", logger="llm_allreduce_plugin"):
        own_kernels.say(None)
        assert not caplog.records
        monkeypatch.setitem(sys.modules, "sglang.kernels.ops.kimi_k3.all_reduce", SimpleNamespace(_COMM_MAP={2: "v2"}))
        own_kernels.say(None)
        own_kernels.say(None)
    assert [record.getMessage() for record in caplog.records] == [
        "all-reduce fusion: this model has kernels of its own that sum through SGLang's custom all-reduce, "
        "which bypasses allreduce_strategy: kimi_k3.all_reduce"
    ]


def test_models_that_give_the_communicator_at_each_call_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    beam = type("BeamModel", (), {"__module__": "sglang.srt.models.beam"})
    runner = SimpleNamespace(model=type("BeamForCausalLM", (beam,), {"__module__": "sglang.srt.models.beam"})())
    before = own_kernels.found()
    assert [name for name in own_kernels.found(runner.model) if name not in before] == ["models.beam"]

    @functools.cache
    def made(comm: str) -> str:
        return comm

    monkeypatch.setitem(sys.modules, own_kernels._DECODE, SimpleNamespace(_get_decode_comm=made))
    assert own_kernels.found() == before, "a model that does not use it"
    made("v2")
    assert [name for name in own_kernels.found() if name not in before] == ["layers.moe.qwen4_decode"]
    own_kernels._say_once.cache_clear()
    own_kernels.say(None, runner)
    assert own_kernels._say_once.cache_info().currsize == 1
