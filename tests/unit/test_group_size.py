"""Settings that do not fit the number of ranks are found where that number is known first, not in the ranks."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from llm_allreduce_plugin import ConfigError, NodeTopology
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.engines.vllm.plugin import apply_settings
from tests.unit.test_topology import FOLDER

RUNNER = CliRunner()
H200 = str(FOLDER / "h200_x4_nvswitch.json")
THREE = '{"domains": [0, 0, 1]}'
SAID = "domains=[0, 0, 1]: has 3 numbers: must have one for each of the {} ranks"


@pytest.mark.parametrize(("group", "ranks"), [(["--topology", H200], 4), (["--cpu"], 2)])
def test_explain(group: list[str], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ALLREDUCE_LOW_PRECISION", THREE)
    result = RUNNER.invoke(app, ["explain", *group])
    assert result.exit_code == 2, result.output
    assert f"error: environment: LLM_ALLREDUCE_LOW_PRECISION.{SAID.format(ranks)}" in result.output
    assert RUNNER.invoke(app, ["explain", *group, "--tp", "3"]).exit_code == 0


def test_check_speaks_of_the_group_that_settings_speak_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings_finding() -> dict[str, Any]:
        document = json.loads(RUNNER.invoke(app, ["check", "--no-proof", "--json"]).output)
        by_name = {row["name"]: row for row in document["findings"]}
        return by_name["settings"] | {"runs": by_name.get("what runs", {}).get("text", "")}

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("llm_allreduce_plugin.topology.nvml.detect", _four_gpus)
    monkeypatch.setenv("LLM_ALLREDUCE_LOW_PRECISION", THREE)
    found = settings_finding()
    assert found["verdict"] == "OK"
    assert "over 3 ranks" in found["runs"]
    monkeypatch.setenv("LLM_ALLREDUCE_LOW_PRECISION", '{"domains": [0, 0, 0, 1, 1, 1]}')
    found = settings_finding()
    assert found["verdict"] == "FAIL"
    assert "has 6 numbers: must have one for each of the 4 ranks" in found["text"]


def _four_gpus() -> NodeTopology:
    return NodeTopology.from_json(FOLDER / "h200_x4_nvswitch.json")


def vllm_config(world_size: int, strategy: str) -> Any:
    """What vLLM hands to plugins, as far as this one looks."""
    return SimpleNamespace(
        additional_config={"allreduce": {"allreduce_strategy": strategy, "low_precision": {"domains": [0, 0, 1]}}},
        parallel_config=SimpleNamespace(tensor_parallel_size=world_size, enable_elastic_ep=False),
        compilation_config=SimpleNamespace(pass_config=None),
    )


def test_vllm_does_not_start_workers() -> None:
    for strategy in ("LOWPRECISION", "AUTO"):
        apply_settings(vllm_config(3, strategy))
        with pytest.raises(ConfigError) as caught:
            apply_settings(vllm_config(4, strategy))
        assert SAID.format(4) in str(caught.value)
    apply_settings(vllm_config(4, "NCCL"))  # which leaves vLLM alone
    apply_settings(vllm_config(1, "AUTO"))
