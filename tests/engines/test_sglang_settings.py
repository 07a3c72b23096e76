"""What SGLang's arguments may say, without SGLang."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_allreduce_plugin import AllReduceConfig, ConfigError, load_config
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.engines.common import summary
from llm_allreduce_plugin.engines.sglang import flags, fusion, hooks, own_kernels, plugin
from llm_allreduce_plugin.engines.sglang.fusion import prepare
from llm_allreduce_plugin.engines.sglang.settings import overridden, settings_of, stands_aside


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags write variables: nothing of a test may reach the next one."""
    for field in AllReduceConfig.model_fields:
        monkeypatch.setenv(flags.variable_of(field), "")
    monkeypatch.delenv("SGLANG_ENABLE_PCIE_IPC_ALLREDUCE", raising=False)
    monkeypatch.setattr(flags, "_given", {})


@pytest.fixture(autouse=True)
def boundary_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of groups and of layer boundaries took; in no SGLang."""
    monkeypatch.setattr(fusion, "_installed", lambda: None)
    monkeypatch.setattr(hooks, "not_applied", lambda _hooks: [])
    monkeypatch.setattr(hooks, "exists", lambda _target: False)


def server_args(override: Any = None, *, tp: int = 2, **fields: Any) -> Any:
    """The parts of ServerArgs that the plugin looks at."""
    text = override if isinstance(override, str) else json.dumps(override or {})
    fields = {"device": "cuda", "enforce_disable_flashinfer_allreduce_fusion": False, **fields}
    return SimpleNamespace(json_model_override_args=text, tp_size=tp, **fields)


# -- json_model_override_args ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "strategy", "timeout"),
    [
        ({}, "AUTO", 60),
        ("no JSON", "AUTO", 60),
        ("[1]", "AUTO", 60),
        ({"num_hidden_layers": 2, "rope_scaling": {"factor": 2}}, "AUTO", 60),
        ({"llm_allreduce": {"allreduce_strategy": "oneshot", "timeout_s": 5}}, "ONESHOT", 5),
        ({"allreduce_strategy": "TWOSHOT"}, "TWOSHOT", 60),
        ({"llm_allreduce": {"timeout_s": 5}, "allreduce_strategy": "NCCL"}, "NCCL", 5),
    ],
)
def test_accepted(override: Any, strategy: str, timeout: float) -> None:
    settings = settings_of(server_args(override))
    assert settings.allreduce_strategy == strategy
    assert settings.timeout_s == timeout


@pytest.mark.parametrize("wire", list(WireFormat))
def test_every_wire_format(wire: WireFormat) -> None:
    given = {"llm_allreduce": {"allreduce_strategy": "LOWPRECISION", "low_precision": {"wire_format": str(wire)}}}
    assert settings_of(server_args(given)).low_precision.wire_format is wire


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ({"llm_allreduce": {"allreduce_strategy": "FAST"}}, "allreduce_strategy='FAST': must be one of AUTO"),
        ({"llm_allreduce": "ONESHOT"}, "llm_allreduce='ONESHOT': must be a mapping"),
        ({"llm_allreduce": {"timeout": 3}}, "timeout=3: unknown key"),
        ({"allreduce": {"timeout_s": 3}}, "allreduce={'timeout_s': 3}: unknown key; allowed are llm_allreduce, "),
        ({"llm_all_reduce": {"timeout_s": 3}}, "did you mean llm_allreduce?"),
        ({"timeout_s": 3}, "timeout_s=3: belongs into llm_allreduce: give {'llm_allreduce': {'timeout_s': ...}}"),
        ({"llm_allreduce": {"allreduce_strategy": "UB"}, "allreduce_strategy": "NCCL"}, "'NCCL' contradicts"),
    ],
)
def test_refused_before_anything_starts(override: Any, text: str) -> None:
    arguments = server_args(override)
    with pytest.raises(ConfigError) as caught:
        plugin.check_arguments(arguments)
    assert str(caught.value).startswith("SGLang json_model_override_args: ")
    assert text in str(caught.value)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False


# -- flags -------------------------------------------------------------------------------------------------------------


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sglang serve", exit_on_error=False)
    plugin.add_flags(None, parser)
    return parser.parse_args(words)


def test_flags_reach_the_settings() -> None:
    parse("--allreduce-strategy", "oneshot", "--allreduce-config", '{"timeout_s": 5, "fuse_norm": false}')
    settings = settings_of(server_args())
    assert (settings.allreduce_strategy, settings.timeout_s, settings.fuse_norm) == ("ONESHOT", 5, False)
    assert settings == load_config(), "schedulers, which only inherit the environment, see the same"


def test_every_setting_can_be_carried(tmp_path: Path) -> None:
    given = AllReduceConfig(
        allreduce_strategy="LOWPRECISION", timeout_s=1.5, first_timeout_s=2, start_timeout_s=3, transport="host",
        workspace_bytes="64MiB", one_shot_max_bytes=0, tuning_profile="none", in_band=False, staged="on",
        low_precision={"wire_format": "tq3", "domains": [0, 1], "min_bytes": None}, report_dir=tmp_path,
        check_calls=True, fuse_norm=False, registered_pool="1GiB", multicast="auto", in_switch_sum=True,
    )  # fmt: skip
    assert given.model_fields_set == set(AllReduceConfig.model_fields)
    parse("--allreduce-config", given.model_dump_json())
    assert load_config() == given


def test_a_file_of_settings(tmp_path: Path) -> None:
    file = tmp_path / "allreduce.yaml"
    file.write_text("allreduce_strategy: TWOSHOT\nlow_precision:\n  wire_format: tq3\n")
    parse("--allreduce-config", str(file))
    assert load_config().allreduce_strategy == "TWOSHOT"
    assert load_config().low_precision.wire_format == "tq3"


def test_flags_come_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ALLREDUCE_TIMEOUT_S", "7")
    monkeypatch.setenv("llm_allreduce_strategy", "NCCL")
    parse("--allreduce-strategy", "UB")
    assert (load_config().allreduce_strategy, load_config().timeout_s) == ("UB", 7)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--allreduce-strategy", "FAST"), "argument --allreduce-strategy: 'FAST': must be one of AUTO, NCCL"),
        (("--allreduce-config", '{"timeout_s": -1}'), "timeout_s=-1: input should be greater than 0"),
        (("--allreduce-config", '{"timeout_s": 1, "timeout_s": 2}'), "argument --allreduce-config: not valid JSON"),
        (("--allreduce-config", '{"timeout": 3}'), "--allreduce-config: timeout=3: unknown key"),
        (("--allreduce-config", "/no/such/file.yaml"), "file /no/such/file.yaml: cannot be read"),
        (("--allreduce-config", "ONESHOT"), "file ONESHOT: suffix ''"),
        (
            ("--allreduce-strategy", "UB", "--allreduce-config", '{"allreduce_strategy": "NCCL"}'),
            "strategy NCCL contradicts UB of --allreduce-strategy: give one of them",
        ),
    ],
)
def test_wrong_flags(words: tuple[str, ...], text: str) -> None:
    with pytest.raises(argparse.ArgumentError) as caught:
        parse(*words)
    assert text in str(caught.value)


def test_the_later_of_two_flags_counts() -> None:
    """Keys of a --config file come before the command line's."""
    parse("--allreduce-strategy", "UB", "--allreduce-strategy", "TWOSHOT")
    assert settings_of(server_args()).allreduce_strategy == "TWOSHOT"


def test_flag_and_override_args_must_agree() -> None:
    parse("--allreduce-strategy", "oneshot")
    assert settings_of(server_args({"allreduce_strategy": "ONESHOT"})).allreduce_strategy == "ONESHOT"
    with pytest.raises(ConfigError, match="allreduce_strategy='UB' contradicts --allreduce-strategy ONESHOT"):
        settings_of(server_args({"llm_allreduce": {"allreduce_strategy": "UB"}}))


# -- SGLang's switches -------------------------------------------------------------------------------------------------

SWITCHES = {
    "disable_custom_all_reduce": "--disable-custom-all-reduce",
    "enable_symm_mem": "--enable-symm-mem",
    "enable_torch_symm_mem": "--enable-torch-symm-mem",
    "enable_mscclpp": "--enable-mscclpp",
}


@pytest.mark.parametrize("field", SWITCHES)
def test_a_switch_leaves_sglang_alone(field: str) -> None:
    arguments = server_args({"llm_allreduce": {"timeout_s": 5}}, **{field: True})
    reason = stands_aside(arguments, settings_of(arguments))
    assert reason == f"{SWITCHES[field]} was given; set allreduce_strategy to override it"
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False


@pytest.mark.parametrize("field", SWITCHES)
def test_a_strategy_by_name_comes_over_a_switch(field: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments = server_args({"allreduce_strategy": "AUTO"}, **{field: True})
    assert stands_aside(arguments, settings_of(arguments)) is None
    with caplog.at_level("WARNING", logger="llm_allreduce_plugin"):
        plugin.check_arguments(arguments)
    assert [record.getMessage() for record in caplog.records] == [
        f"{SWITCHES[field]} is ignored: allreduce_strategy AUTO was set, and overrides it"
    ]


def test_a_switch_that_is_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, counts in (("0", False), ("false", False), ("1", True), ("true", True)):
        monkeypatch.setenv("SGLANG_ENABLE_PCIE_IPC_ALLREDUCE", value)
        assert (stands_aside(server_args(), settings_of(server_args())) is not None) is counts


def test_what_deterministic_inference_sets_is_nobodys_wish() -> None:
    arguments = server_args(disable_custom_all_reduce=True, enable_deterministic_inference=True)
    assert stands_aside(arguments, settings_of(arguments)) is None
    assert prepare(arguments, settings_of(arguments)) == "deterministic inference asks for SGLang's own norm"
    arguments.enable_mscclpp = True
    assert stands_aside(arguments, settings_of(arguments)) is not None


def test_nvls_is_for_nccl(caplog: pytest.LogCaptureFixture) -> None:
    arguments = server_args(enable_nccl_nvls=True)
    assert stands_aside(arguments, settings_of(arguments)) is None
    assert overridden(arguments, settings_of(arguments), fuses=True) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"elastic_ep_backend": "mooncake"}, "elastic expert parallelism"),
        ({"device": "npu"}, "the device is npu"),
        ({"device": "xpu:1"}, "the device is xpu:1"),
    ],
)
def test_reasons_to_stand_aside(fields: dict[str, Any], text: str) -> None:
    arguments = server_args({"allreduce_strategy": "ONESHOT"}, **fields)
    assert text in str(stands_aside(arguments, settings_of(arguments)))
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False


def test_groups_without_a_server_have_the_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ALLREDUCE_STRATEGY", "UB")
    settings = settings_of(None)
    assert settings.allreduce_strategy == "UB"
    assert stands_aside(None, settings, "cuda") is None
    assert prepare(None, settings) is None


def test_nccl_is_stock() -> None:
    arguments = server_args({"allreduce_strategy": "nccl"}, enable_mscclpp=True)
    assert stands_aside(arguments, settings_of(arguments)) == "allreduce_strategy is NCCL"
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False
    assert stands_aside(server_args(device=None), settings_of(server_args()), "cpu") is None


# -- fusion ------------------------------------------------------------------------------------------------------------


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


def test_sealed_arguments_are_not_written() -> None:
    arguments = server_args({"llm_allreduce": {"allreduce_strategy": "FAST"}}, _resolution_finished=True)
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False


def test_one_rank_needs_nothing() -> None:
    arguments = server_args({"llm_allreduce": {"low_precision": {"domains": [0, 1]}}}, tp=1)
    plugin.check_arguments(arguments)
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False
    with pytest.raises(ConfigError, match=r"low_precision.domains=\[0, 1\]: has 2 numbers"):
        plugin.check_arguments(server_args({"llm_allreduce": {"low_precision": {"domains": [0, 1]}}}, tp=4))


# -- versions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ("0.5.17", "0.5.20.post1", "0.5.23", "0.5.23+cu130"))
def test_versions_that_were_tried(version: str) -> None:
    assert plugin.untried(version) is None


@pytest.mark.parametrize("version", ("0.5.16", "0.5.24", "0.6.0", "1.0", "main"))
def test_other_versions_are_named(version: str) -> None:
    assert f"SGLang {version} was not tried (this release is made for 0.5.17 to 0.5.23)" in str(plugin.untried(version))


# -- models with kernels of their own ----------------------------------------------------------------------------------


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


# -- the end -----------------------------------------------------------------------------------------------------------


def test_the_summary_comes_before_a_server_kills_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(summary, "_untold", [lambda: told.append("summary")])
    plugin.before_kill(os.getpid(), include_parent=False)
    plugin.before_kill(os.getpid() + 1)
    plugin.before_kill(None)
    assert told == []
    plugin.before_kill(os.getpid())
    plugin.before_kill(os.getpid())
    assert told == ["summary"]


def test_a_summary_that_fails_stops_no_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(summary, "_untold", [lambda: 1 / 0])
    plugin.before_kill(os.getpid())
    assert "the summary at the end could not be made" in caplog.text
