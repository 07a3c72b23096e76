"""Settings: four sources, their order, and what is said about a wrong one."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import llm_allreduce_plugin
from llm_allreduce_plugin import AllReduceConfig, AllReduceStrategy, ConfigError, LlmArgs
from llm_allreduce_plugin.config import ENV_PREFIX, environment_table
from llm_allreduce_plugin.engines.sglang import flags

EXAMPLES = Path(__file__).parents[2] / "configs" / "vllm"
NAMES = [str(name) for name in AllReduceStrategy]


def load_config(engine: Any = None, *, environment: dict[str, str]) -> AllReduceConfig:
    """As the package's, in an environment with no other variables of ours."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    with mock.patch.dict(os.environ, others | environment, clear=True):
        return llm_allreduce_plugin.load_config(engine)


def write(folder: Path, name: str, text: str) -> dict[str, str]:
    path = folder / name
    path.write_text(text)
    return {"LLM_ALLREDUCE_CONFIG": str(path)}


@given(st.sampled_from(NAMES), st.data())
def test_strategy_names_in_any_case(name: str, data: st.DataObject) -> None:
    spelled = "".join(data.draw(st.sampled_from((c.lower(), c.upper()))) for c in name)
    assert AllReduceStrategy.parse(f" {spelled} ") is AllReduceStrategy(name)


def test_min_latency_is_a_spelling() -> None:
    assert AllReduceStrategy.parse("min_latency") is AllReduceStrategy.MINLATENCY


@given(st.one_of(st.text(), st.integers(), st.none(), st.floats(), st.lists(st.text())))
def test_unknown_names_are_never_auto(value: object) -> None:
    if isinstance(value, str) and value.strip().upper().replace("MIN_LATENCY", "MINLATENCY") in NAMES:
        return
    with pytest.raises(ValueError, match="AUTO, NCCL, UB, MINLATENCY, ONESHOT, TWOSHOT, LOWPRECISION, MNNVL"):
        AllReduceStrategy.parse(value)


def test_transports_in_any_case() -> None:
    assert str(AllReduceConfig(transport="HOST").transport) == "host"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"transport='pcie': .*'auto', 'peer' or 'host'"):
        load_config({"transport": "pcie"}, environment={})


def test_defaults() -> None:
    config = load_config(environment={})
    assert config == AllReduceConfig()
    assert config.allreduce_strategy is AllReduceStrategy.AUTO
    assert config.timeout_s == 60.0


def test_order_of_sources(tmp_path: Path) -> None:
    environment = write(tmp_path, "a.yaml", "allreduce_strategy: nccl\ntimeout_s: 5\nworkspace_bytes: 8MiB\n")
    from_file = load_config(environment=environment)
    assert (from_file.allreduce_strategy, from_file.timeout_s, from_file.workspace_bytes) == ("NCCL", 5.0, 8 << 20)
    environment |= {"LLM_ALLREDUCE_STRATEGY": "twoshot", "LLM_ALLREDUCE_TIMEOUT_S": "7"}
    from_environment = load_config(environment=environment)
    assert (from_environment.allreduce_strategy, from_environment.timeout_s) == ("TWOSHOT", 7.0)
    assert from_environment.workspace_bytes == 8 << 20
    from_engine = load_config({"allreduce_strategy": "ONESHOT"}, environment=environment)
    assert (from_engine.allreduce_strategy, from_engine.timeout_s) == ("ONESHOT", 7.0)


@pytest.mark.parametrize("suffix", (".json", ".yaml", ".yml"))
def test_file_formats(tmp_path: Path, suffix: str) -> None:
    environment = write(tmp_path, f"settings{suffix}", json.dumps({"allreduce_strategy": "UB", "timeout_s": 2.5}))
    config = load_config(environment=environment)
    assert (config.allreduce_strategy, config.timeout_s) == ("UB", 2.5)


def test_empty_variable_is_unset() -> None:
    assert load_config(environment={"LLM_ALLREDUCE_STRATEGY": ""}) == AllReduceConfig()


@pytest.mark.parametrize(
    ("environment", "engine", "parts"),
    [
        (
            {"LLM_ALLREDUCE_STRATEGY": "FASTEST"},
            None,
            ["environment", "LLM_ALLREDUCE_STRATEGY='FASTEST'", "MINLATENCY"],
        ),
        ({"LLM_ALLREDUCE_TIMEOUT_S": "soon"}, None, ["environment", "LLM_ALLREDUCE_TIMEOUT_S='soon'", "number"]),
        ({"LLM_ALLREDUCE_TIMEOUT_S": "0"}, None, ["environment", "LLM_ALLREDUCE_TIMEOUT_S='0'", "greater than 0"]),
        (
            {"LLM_ALLREDUCE_STRATEGIE": "NCCL"},
            None,
            ["environment", "LLM_ALLREDUCE_STRATEGIE", "did you mean LLM_ALLREDUCE_STRATEGY"],
        ),
        (
            {},
            {"allreduce_stratgy": "NCCL"},
            ["engine configuration", "allreduce_stratgy='NCCL'", "did you mean allreduce_strategy"],
        ),
        ({}, {"workspace_bytes": "12 parsecs"}, ["engine configuration", "workspace_bytes='12 parsecs'", "byte"]),
        (
            {},
            {"workspace_bytes": 17},
            ["engine configuration", "workspace_bytes=17", "greater than or equal to 2097152"],
        ),
        ({}, {"timeout_s": float("nan")}, ["engine configuration", "timeout_s=nan", "finite"]),
        ({}, {"timeout_s": [1]}, ["engine configuration", "timeout_s=[1]", "number"]),
        ({}, "ONESHOT", ["engine configuration", "'ONESHOT'", "mapping"]),
    ],
)
def test_errors_name_source_field_value_and_what_is_allowed(
    environment: dict[str, str],
    engine: Any,
    parts: list[str],
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(engine, environment=environment)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.yaml", "allreduce_strategy: [", ["not valid YAML"]),
        ("a.json", "{", ["not valid JSON"]),
        ("a.yaml", "- 1\n- 2\n", ["a.yaml", "mapping"]),
        ("a.toml", "", ["a.toml", "'.toml'", ".json, .yaml, .yml"]),
        ("a.yaml", "timeout: 3", ["a.yaml", "timeout=3", "unknown key", "did you mean timeout_s"]),
        ("a.yaml", "allreduce_strategy: QUICK", ["a.yaml", "allreduce_strategy='QUICK'", "ONESHOT"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environment=write(tmp_path, name, text))
    for part in parts:
        assert part in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file .*LLM_ALLREDUCE_CONFIG"):
        load_config(environment={"LLM_ALLREDUCE_CONFIG": str(tmp_path / "nowhere.yaml")})


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(environment={"LLM_ALLREDUCE_CONFIG": str(tmp_path / "folder.yaml")})


def test_config_is_frozen_and_strict() -> None:
    config = AllReduceConfig()
    with pytest.raises(ValidationError):
        config.timeout_s = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra"):
        AllReduceConfig(strategy="ONESHOT")  # type: ignore[call-arg]


def test_what_depends_on_the_number_of_ranks_names_its_source(tmp_path: Path) -> None:
    """Each key of a nested setting has its own: one source may give the domains, and another the wire format."""
    wrong = {"low_precision": {"domains": [0, 1, 2]}}
    of_file = write(tmp_path, "a.yaml", "low_precision: {domains: [0, 1, 2]}")
    of_file["LLM_ALLREDUCE_LOW_PRECISION"] = '{"wire_format": "tq3"}'
    of_variable = {"LLM_ALLREDUCE_LOW_PRECISION": '{"domains": [0, 1, 2]}'}
    for config, where in (
        (load_config(environment=of_file), f"file {tmp_path / 'a.yaml'}: low_precision.domains="),
        (load_config(environment=of_variable), "environment: LLM_ALLREDUCE_LOW_PRECISION.domains="),
        (load_config(wrong, environment=of_variable), "engine configuration: low_precision.domains="),
        (AllReduceConfig.model_validate(wrong), "low_precision.domains="),
    ):
        with pytest.raises(ConfigError) as caught:
            config.model_copy().check_world_size(4)
        assert str(caught.value).startswith(f"{where}[0, 1, 2]: has 3 numbers: must have one for each of the 4 ranks")
        assert config == AllReduceConfig.model_validate(config.model_dump(exclude_unset=True)), "whatever the source"
        assert hash(config) == hash(config.model_copy())
        assert pickle.loads(pickle.dumps(config)) == config


def test_llm_args() -> None:
    assert LlmArgs().allreduce_strategy is AllReduceStrategy.AUTO
    assert LlmArgs(allreduce_strategy="oneshot").vllm_kwargs() == {  # type: ignore[arg-type]
        "additional_config": {"allreduce": {"allreduce_strategy": "ONESHOT"}}
    }
    for_sglang = LlmArgs(allreduce=AllReduceConfig(workspace_bytes="4MiB")).sglang_kwargs()  # type: ignore[arg-type]
    assert list(for_sglang) == ["json_model_override_args"]
    assert json.loads(for_sglang["json_model_override_args"]) == {"llm_allreduce": {"workspace_bytes": 4 << 20}}
    assert LlmArgs().sglang_kwargs() == {"json_model_override_args": '{"llm_allreduce": {}}'}
    both = LlmArgs(allreduce_strategy="TWOSHOT", allreduce=AllReduceConfig(timeout_s=3))  # type: ignore[arg-type]
    assert both.allreduce_config() == AllReduceConfig(allreduce_strategy="TWOSHOT", timeout_s=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be one of AUTO"):
        LlmArgs(allreduce_strategy="quick")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="TWOSHOT.*ONESHOT"):
        LlmArgs(
            allreduce_strategy="TWOSHOT",  # type: ignore[arg-type]
            allreduce=AllReduceConfig(allreduce_strategy="ONESHOT"),  # type: ignore[arg-type]
        ).allreduce_config()


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs" / "vllm").glob("*.yaml")), ids=lambda path: path.stem
)
def test_examples_are_valid(path: Path) -> None:
    settings = yaml.safe_load(path.read_text()).get("additional-config", {}).get("allreduce", {})
    assert load_config(settings, environment={}) == AllReduceConfig(**settings)
    assert "low_precision" not in path.stem or settings["allreduce_strategy"] == "LOWPRECISION"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs" / "sglang").glob("*.yaml")), ids=lambda path: path.stem
)
def test_examples_for_sglang_are_valid(path: Path) -> None:
    """Through the plugin's own flags, as SGLang's reader of --config gives it keys and values."""
    given = yaml.safe_load(path.read_text())
    strategy, further = given["allreduce-strategy"], given.get("allreduce-config", {})
    parser = argparse.ArgumentParser()
    with mock.patch.dict(os.environ):
        flags.add_to(parser)
        parser.parse_args([flags.STRATEGY, strategy, *([flags.CONFIG, json.dumps(further)] if further else [])])
        carried = {name: value for name, value in os.environ.items() if name.startswith(ENV_PREFIX)}
    wanted = AllReduceConfig(allreduce_strategy=strategy, **further)
    assert load_config(environment=carried) == wanted
    assert "low_precision" not in path.stem or (strategy == "LOWPRECISION" and further["low_precision"])


def test_every_variable_is_in_the_table_and_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    variables = [variable for variable, meaning in environment_table() if meaning]
    assert len(variables) == len(AllReduceConfig.model_fields) + 1
    for variable in variables:
        assert variable in page, f"{variable} is not documented"
