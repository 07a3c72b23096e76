"""What vLLM's additional_config may say, without vLLM."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import pytest

from llm_allreduce_plugin import AllReduceConfig, AllReduceStrategy, ConfigError
from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.engines.vllm.plugin import apply_settings
from llm_allreduce_plugin.engines.vllm.settings import settings_of, stands_aside, uncompiled, unfused


def vllm_config(
    additional: Any, *, tp: int = 2, elastic: bool = False, fuse: bool = True, disabled: bool = False
) -> Any:
    """The parts of VllmConfig that the plugin looks at."""
    return SimpleNamespace(
        additional_config=additional,
        parallel_config=SimpleNamespace(
            tensor_parallel_size=tp, enable_elastic_ep=elastic, disable_custom_all_reduce=disabled
        ),
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
        ({"llm_allreduce_plugin": "0.1.0"}, "AUTO", 60),
        ({"allreduce": {"allreduce_strategy": "ONESHOT"}, "allreduce_strategy": "oneshot"}, "ONESHOT", 60),
        ({"allreduce": {"allreduce_strategy": "min_latency"}, "allreduce_strategy": "MINLATENCY"}, "MINLATENCY", 60),
    ],
)
def test_accepted(additional: Any, strategy: str, timeout: float) -> None:
    settings = settings_of(additional)
    assert settings.allreduce_strategy == strategy
    assert settings.timeout_s == timeout


@pytest.mark.parametrize("wire", list(WireFormat))
def test_every_wire_format(wire: WireFormat) -> None:
    given = {"allreduce": {"allreduce_strategy": "LOWPRECISION", "low_precision": {"wire_format": str(wire)}}}
    assert settings_of(given).low_precision.wire_format is wire


@pytest.mark.parametrize(
    ("additional", "text"),
    [
        ({"allreduce_strategy": "FAST"}, "vLLM additional_config: allreduce_strategy='FAST': must be one of AUTO"),
        ({"allreduce": "ONESHOT"}, "vLLM additional_config: allreduce='ONESHOT': must be a mapping"),
        ({"allreduce_stratgy": "NCCL"}, "vLLM additional_config: allreduce_stratgy='NCCL': unknown key"),
        ({"allreduce": {"timeout": 3}}, "vLLM additional_config: timeout=3: unknown key"),
        ({"allreduce": {"allreduce_strategy": "UB"}, "allreduce_strategy": "NCCL"}, "contradicts"),
        ({"allreduce": {"allreduce_strategy": "UB"}, "allreduce_strategy": "quick"}, "'quick' contradicts"),
        ({"allreduce": None}, "vLLM additional_config: allreduce=None: must be a mapping"),
        ({"allreduce": {1: 2}}, "vLLM additional_config: key 1: must be text"),
        ({"allreduce": {"timeout_s": True}}, "vLLM additional_config: timeout_s=True: must not be a boolean"),
    ],
)
def test_refused(additional: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(additional)
    assert text in str(caught.value)
    with pytest.raises(ConfigError):
        apply_settings(vllm_config(additional))


SECTION_MEANT = ("llm_allreduce", "llm-allreduce", "LLMAllreduce", "all_reduce", "all-reduce", "allReduce", "alreduce")
SECTION_MEANT += (
    "allreduce_config",
    "all_reduce_config",
    "allreduce_plugin",
    "vllm_allreduce",
    "allreduc",
    "Allreduce",
)
STRATEGY_MEANT = (
    "all_reduce_strategy",
    "allreduce-strategy",
    "allReduceStrategy",
    "allreduce_stratgy",
    "ALLREDUCE_STRATEGY",
)
STRATEGY_MEANT += ("llm_allreduce_strategy", "allreduce_strategie", "all-reduce-strategy")


@pytest.mark.parametrize(
    ("key", "meant"),
    [(key, "allreduce") for key in SECTION_MEANT] + [(key, "allreduce_strategy") for key in STRATEGY_MEANT],
)
@pytest.mark.parametrize("value", ({"allreduce_strategy": "NCCL"}, "NCCL", 5, None), ids=repr)
def test_what_plainly_means_us_is_not_dropped(key: str, meant: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of({"another_plugin": 1, key: value})
    assert f"vLLM additional_config: {key}={value!r}: unknown key" in str(caught.value)
    assert str(caught.value).endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize("value", ({"allreduce_strategy": "NCCL"}, {}, None, 5), ids=repr)
def test_our_name_is_a_stamp_only_as_text(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"llm_allreduce_plugin=.*: unknown key.*did you mean allreduce\?"):
        settings_of({"llm_allreduce_plugin": value})


@pytest.mark.parametrize("field", [name for name in AllReduceConfig.model_fields if name != "allreduce_strategy"])
def test_a_bare_setting_is_not_dropped(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}=5: belongs into allreduce: give {{'allreduce': {{'{field}': "):
        settings_of({field: 5})


OTHERS = ("ascend_scheduler_config", "torchair_graph_config", "gdn_prefill_backend", "kda_decode_backend", "refresh")
OTHERS += (
    "reduce",
    "reduce_scatter",
    "allgather_ep",
    "enable_matmul_allreduce",
    "all_to_all",
    "xlite_graph_config",
    "",
)
OTHERS += ("strategy", "algorithm", "domains", "llm", "plugin", "version", "overlap_all_reduce_chunks")


def test_other_plugins_keys_are_left_alone() -> None:
    others: dict[Any, Any] = {key: {"allreduce_strategy": "QUICK"} for key in OTHERS}
    others |= {1: 2, None: 3, ("a",): 4}
    assert settings_of(others) == AllReduceConfig()
    assert settings_of({**others, "allreduce_strategy": "UB"}).allreduce_strategy == "UB"


# -- --disable-custom-all-reduce ---------------------------------------------------------------------------------------


def test_the_flag_leaves_vllm_alone() -> None:
    config = vllm_config({"allreduce": {"timeout_s": 5}}, disabled=True)
    reason = stands_aside(config, settings_of(config.additional_config), custom_all_reduce=True)
    assert reason is not None
    assert "--disable-custom-all-reduce" in reason
    before = dict(config.additional_config)
    apply_settings(config, custom_all_reduce=True)
    assert config.compilation_config.pass_config.fuse_allreduce_rms is True
    assert config.additional_config == before


@pytest.mark.parametrize("strategy", ("ONESHOT", "AUTO"))
@pytest.mark.parametrize("source", ("engine", "environment"))
def test_a_strategy_by_name_comes_over_the_flag(
    strategy: str, source: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = vllm_config({"allreduce_strategy": strategy} if source == "engine" else {}, disabled=True)
    if source == "environment":
        monkeypatch.setenv("LLM_ALLREDUCE_STRATEGY", strategy)
    assert stands_aside(config, settings_of(config.additional_config), custom_all_reduce=True) is None
    with caplog.at_level("WARNING", logger="llm_allreduce_plugin"):
        apply_settings(config, custom_all_reduce=True)
    assert config.compilation_config.pass_config.fuse_allreduce_rms is False
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"--disable-custom-all-reduce is ignored: allreduce_strategy {strategy} was set, and overrides it"]


def test_nccl_and_the_flag_agree(caplog: pytest.LogCaptureFixture) -> None:
    config = vllm_config({"allreduce_strategy": "NCCL"}, disabled=True)
    assert stands_aside(config, settings_of(config.additional_config), custom_all_reduce=True) == (
        "allreduce_strategy is NCCL"
    )
    apply_settings(config, custom_all_reduce=True)
    assert not caplog.records


def test_a_flag_that_vllm_set_itself_is_nobodys_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM sets it on platforms without such kernels, CPU ranks among them, and for batch invariance."""
    config = vllm_config({}, disabled=True)
    assert stands_aside(config, settings_of({}), custom_all_reduce=False) is None
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert stands_aside(config, settings_of({}), custom_all_reduce=True) is None
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert stands_aside(config, settings_of({}), custom_all_reduce=True) is not None
    assert stands_aside(vllm_config({}), settings_of({}), custom_all_reduce=True) is None


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


@pytest.mark.parametrize("switch", ("VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC", "VLLM_USE_NCCL_SYMM_MEM"))
def test_other_all_reduces_of_vllms_by_name(
    switch: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = vllm_config({})
    monkeypatch.setenv(switch, "0")
    assert stands_aside(config, settings_of({})) is None
    monkeypatch.setenv(switch, "1")
    assert stands_aside(config, settings_of({})) == f"{switch}=1 was given; set allreduce_strategy to override it"
    assert stands_aside(config, settings_of({}), device="cpu") is None, "they are of GPUs"
    config = vllm_config({"allreduce_strategy": "AUTO"})
    apply_settings(config)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{switch}=1 is ignored: allreduce_strategy AUTO was set, and overrides it"
    ]


@pytest.mark.parametrize("device", ("xpu", "tpu:0", "hpu", "npu"))
def test_other_devices_are_left_alone(device: str) -> None:
    config = vllm_config({"allreduce_strategy": "ONESHOT"})
    reason = stands_aside(config, settings_of(config.additional_config), device=device)
    assert reason == f"there are kernels for CUDA GPUs and CPU ranks, and the device is {device}"
    before = dict(config.additional_config)
    apply_settings(config, device=device)
    assert config.compilation_config.pass_config.fuse_allreduce_rms is True
    assert config.additional_config == before


def test_gpus_of_amd_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.hip", "6.4")
    assert "the device is rocm" in str(stands_aside(None, AllReduceConfig(), device="cuda"))
    assert stands_aside(None, AllReduceConfig(), device="cpu") is None


# -- fusion ------------------------------------------------------------------------------------------------------------

MODES = {"VLLM_COMPILE": 3, "DYNAMO_TRACE_ONCE": 2, "NONE": 0}
CompilationMode = enum.IntEnum("CompilationMode", MODES)


def compiled_config(mode: str, *, sp: bool = False, eager: bool = False, **settings: Any) -> Any:
    config = vllm_config({"allreduce": {"allreduce_strategy": "ONESHOT", **settings}})
    config.compilation_config.mode = CompilationMode[mode]
    config.compilation_config.pass_config.enable_sp = sp
    config.model_config = SimpleNamespace(enforce_eager=eager)
    return config


def test_ours_replaces_flashinfers_fusion(caplog: pytest.LogCaptureFixture) -> None:
    config = compiled_config("VLLM_COMPILE")
    assert unfused(config, settings_of(config.additional_config)) is None
    with caplog.at_level("INFO", logger="llm_allreduce_plugin"):
        apply_settings(config)
    assert config.compilation_config.pass_config.fuse_allreduce_rms is False
    assert [record.getMessage() for record in caplog.records] == [
        "compilation pass fuse_allreduce_rms turned off: FlashInfer's fused kernel would bypass "
        "allreduce_strategy; this plugin fuses the same layer boundaries"
    ]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (compiled_config("VLLM_COMPILE", fuse_norm=False), "fuse_norm is off"),
        (compiled_config("VLLM_COMPILE", sp=True), "sequence parallelism"),
        (compiled_config("NONE", eager=True), "enforce_eager is on"),
        (compiled_config("DYNAMO_TRACE_ONCE"), "compilation mode DYNAMO_TRACE_ONCE has no passes of vLLM's"),
    ],
    ids=("fuse_norm", "sequence parallelism", "enforce_eager", "another mode"),
)
def test_where_ours_cannot_nothing_is_taken_away(config: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    said = unfused(config, settings_of(config.additional_config))
    assert said is not None
    assert reason in said
    with caplog.at_level("INFO", logger="llm_allreduce_plugin"):
        apply_settings(config)
    assert config.compilation_config.pass_config.fuse_allreduce_rms is True
    assert f"fuse_allreduce_rms left on, because this plugin does not replace it: {said}" in caplog.text
    runs = uncompiled(config) is None
    assert ("the all-reduces that it fuses bypass allreduce_strategy" in caplog.text) is runs
    assert ("it does not run, so no all-reduce bypasses allreduce_strategy" in caplog.text) is not runs


def test_compile_cache_tells_fused_graphs_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, unfused_ = compiled_config("VLLM_COMPILE"), compiled_config("VLLM_COMPILE")
    apply_settings(fused)
    monkeypatch.setenv("LLM_ALLREDUCE_FUSE_NORM", "false")  # which vLLM does not hash
    apply_settings(unfused_)
    assert fused.additional_config["llm_allreduce_plugin"] == __version__
    assert unfused_.additional_config["llm_allreduce_plugin"] == f"{__version__} unfused"
    apply_settings(unfused_)  # the stamp is no unknown key
