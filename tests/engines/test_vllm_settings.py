"""What vLLM's additional_config may say, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llm_allreduce_plugin import AllReduceStrategy, ConfigError
from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.engines.vllm.plugin import apply_settings
from llm_allreduce_plugin.engines.vllm.settings import settings_of, stands_aside


def vllm_config(additional: Any, *, tp: int = 2, elastic: bool = False, fuse: bool = True) -> Any:
    """The parts of VllmConfig that the plugin looks at."""
    return SimpleNamespace(
        additional_config=additional,
        parallel_config=SimpleNamespace(tensor_parallel_size=tp, enable_elastic_ep=elastic),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(fuse_allreduce_rms=fuse)),
    )


@pytest.mark.parametrize(
    ("additional", "strategy", "timeout"),
    [
        ({}, "AUTO", 60),
        (None, "AUTO", 60),
        ({"allreduce_strategy": "oneshot"}, "ONESHOT", 60),
        ({"allreduce": {"allreduce_strategy": "TWOSHOT", "timeout_s": 5}}, "TWOSHOT", 5),
        ({"allreduce": {"timeout_s": 5}, "allreduce_strategy": "NCCL"}, "NCCL", 5),
        ({"another_plugin": {"x": 1}}, "AUTO", 60),
    ],
)
def test_accepted(additional: Any, strategy: str, timeout: float) -> None:
    settings = settings_of(additional)
    assert settings.allreduce_strategy == strategy
    assert settings.timeout_s == timeout


@pytest.mark.parametrize(
    ("additional", "text"),
    [
        ({"allreduce_strategy": "FAST"}, "vLLM additional_config: allreduce_strategy='FAST': must be one of AUTO"),
        ({"allreduce": "ONESHOT"}, "vLLM additional_config: allreduce='ONESHOT': must be a mapping"),
        ({"allreduce_stratgy": "NCCL"}, "vLLM additional_config: allreduce_stratgy='NCCL': unknown key"),
        ({"allreduce": {"timeout": 3}}, "vLLM additional_config: timeout=3: unknown key"),
        ({"allreduce": {"allreduce_strategy": "UB"}, "allreduce_strategy": "NCCL"}, "contradicts"),
    ],
)
def test_refused(additional: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(additional)
    assert text in str(caught.value)
    with pytest.raises(ConfigError):
        apply_settings(vllm_config(additional))


def test_environment_reaches_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ALLREDUCE_STRATEGY", "TWOSHOT")
    assert settings_of({}).allreduce_strategy is AllReduceStrategy.TWOSHOT
    assert settings_of({"allreduce_strategy": "ONESHOT"}).allreduce_strategy is AllReduceStrategy.ONESHOT


def test_fusion_is_turned_off_and_the_version_stamped() -> None:
    config = vllm_config({"allreduce_strategy": "ONESHOT"})
    apply_settings(config)
    assert config.compilation_config.pass_config.fuse_allreduce_rms is False
    assert config.additional_config["llm_allreduce_plugin"] == __version__
    apply_settings(config)  # the stamp is no unknown key


@pytest.mark.parametrize(
    "config",
    [
        vllm_config({"allreduce_strategy": "NCCL"}),
        vllm_config({"allreduce_strategy": "ONESHOT"}, elastic=True),
        vllm_config({"allreduce_strategy": "ONESHOT"}, tp=1),
    ],
    ids=("NCCL", "elastic EP", "TP 1"),
)
def test_vllm_is_left_alone(config: Any) -> None:
    before = dict(config.additional_config)
    apply_settings(config)
    assert config.compilation_config.pass_config.fuse_allreduce_rms is True
    assert config.additional_config == before


def test_reasons_to_stand_aside() -> None:
    one_shot, nccl = settings_of({"allreduce_strategy": "ONESHOT"}), settings_of({"allreduce_strategy": "NCCL"})
    assert stands_aside(None, one_shot) is None
    assert stands_aside(None, nccl) == "allreduce_strategy is NCCL"
    assert stands_aside(vllm_config({}), one_shot) is None
    assert stands_aside(vllm_config({}), nccl) == "allreduce_strategy is NCCL"
    assert "elastic" in str(stands_aside(vllm_config({}, elastic=True), one_shot))
