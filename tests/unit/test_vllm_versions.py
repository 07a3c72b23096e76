"""A vLLM that nobody has tried: a named reason in the log, and vLLM as it was. Without vLLM."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import pytest

from llm_allreduce_plugin.engines.common import fusion_ops
from llm_allreduce_plugin.engines.vllm import plugin
from llm_allreduce_plugin.engines.vllm.fusion import GraphsWithout
from tests.support.fusion_ranks import OneRank

METHODS = ("get_device_communicator_cls", "get_pass_manager_cls", "check_and_update_config")


RAY = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What registration leaves in the environment is taken away again."""
    monkeypatch.setenv(RAY, "")
    monkeypatch.delenv(RAY)


def register(monkeypatch: pytest.MonkeyPatch, version: str, lacks: str = "") -> type:
    """What vLLM does with plugins, on a platform without one of its methods; that platform."""
    methods = {name: classmethod(lambda cls, *_given: "stock") for name in METHODS if name != lacks}
    platform = type("NewPlatform", (), methods)
    fakes: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version},
        "vllm.platforms": {"current_platform": platform()},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: None},
    }
    for name, content in fakes.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(plugin, "register_operator", lambda: None)
    plugin.register()
    plugin.register()
    return platform


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("version", ("0.26.0", "0.32.1.post1", "0.33.0+cu130"))
def test_versions_that_were_tried(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    platform: Any = register(monkeypatch, version)
    assert platform.get_device_communicator_cls() == plugin.FACTORY
    assert platform.get_pass_manager_cls() == plugin.PASS_MANAGER
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "LLM_ALLREDUCE_"),
        ("", "LLM_ALLREDUCE_"),
        ("MY_,OTHER_", "MY_,OTHER_,LLM_ALLREDUCE_"),
        ("MY_, LLM_ALLREDUCE_", "MY_, LLM_ALLREDUCE_"),
    ],
)
def test_workers_on_ray_get_our_variables(before: str | None, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is not None:
        monkeypatch.setenv(RAY, before)
    register(monkeypatch, "0.32.0")
    assert os.environ[RAY] == after


@pytest.mark.parametrize("version", ("0.25.1", "0.34.0", "1.0", "dev"))
def test_other_versions_are_named(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    platform: Any = register(monkeypatch, version)
    assert platform.get_device_communicator_cls() == plugin.FACTORY
    assert said(caplog) == [
        f"all-reduce: vLLM {version} was not tried (this release is made for 0.26 to 0.33); all methods to patch "
        "were found, so the plugin stays on"
    ]


@pytest.mark.parametrize("lost", METHODS)
def test_a_version_without_a_method_is_left_alone(
    lost: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    platform: Any = register(monkeypatch, "0.40.0", lacks=lost)
    line = f"vLLM 0.40.0 is left alone, as if this plugin were not installed: its NewPlatform has no {lost}"
    assert set(said(caplog)) == {line}
    assert {getattr(platform, name)() for name in METHODS if name != lost} == {"stock"}


@pytest.mark.parametrize(
    ("graphs", "rank", "reason", "lines"),
    [
        ([0, 0, 0, 0, 0], 0, "", 1),
        ([0, 0, 1, 0, 0, 0], 0, "", 0),
        ([0, 0], 0, "", 0),
        ([0, 0, 0], 1, "", 0),
        ([0, 0, 0], 0, "rank 0 cannot norm a row", 0),  # which was told at the start
    ],
)
def test_a_model_without_our_all_reduces_is_told_once(
    graphs: list[int], rank: int, reason: str, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    communicator = OneRank(rank)
    communicator.no_norm_reason = reason
    fusion_ops.serve("tp:3", communicator)  # type: ignore[arg-type]
    caplog.clear()
    counted = GraphsWithout()
    for all_reduces in graphs:
        counted.count(all_reduces)
    assert len(said(caplog)) == lines
    assert all("the first 3 compiled graphs of this model have no all-reduce" in line for line in said(caplog))


def test_nothing_is_told_without_a_group(caplog: pytest.LogCaptureFixture) -> None:
    fusion_ops.serve("tp:3", OneRank())  # type: ignore[arg-type]  # and gone
    counted = GraphsWithout()
    for _ in range(4):
        counted.count(0)
    assert said(caplog) == []
