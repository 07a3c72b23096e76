"""What SGLang's arguments may say, without SGLang."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from llm_allreduce_plugin import AllReduceConfig, ConfigError, load_config
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.engines.sglang import plugin
from llm_allreduce_plugin.engines.sglang.settings import settings_of
from tests.support.sglang_arguments import server_args

pytestmark = pytest.mark.usefixtures("no_sglang_settings", "sglang_hooked")


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
        (("--allreduce-config", "~nosuchuser/x.yaml"), "'~nosuchuser/x.yaml': must be a path; ~nosuchuser is no home"),
        (("--allreduce-config", ""), "'': must be a path, and not empty"),
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
