"""SGLang's own switches, and what else makes the plugin stand aside, without SGLang."""

from __future__ import annotations

from typing import Any

import pytest

from llm_allreduce_plugin.engines.sglang import plugin
from llm_allreduce_plugin.engines.sglang.fusion import prepare
from llm_allreduce_plugin.engines.sglang.settings import overridden, settings_of, stands_aside
from tests.support.sglang_arguments import server_args

pytestmark = pytest.mark.usefixtures("no_sglang_settings", "sglang_hooked")

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
