"""llm-allreduce check, on machines that nobody has: what is said of software, settings and limits, word for word."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_allreduce_plugin import AllReduceConfig
from llm_allreduce_plugin.config import TransportChoice
from llm_allreduce_plugin.diagnosis import Finding, Verdict, limits, software

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL
MIB = 1 << 20


def said(found: Finding) -> tuple[Verdict, str, str]:
    return found.verdict, found.text, found.advice


# -- software ----------------------------------------------------------------------------------------------------------


def test_this_package_loads() -> None:
    found = software.package()
    assert found.verdict is OK
    assert "compiled with CUDA 1" in found.text
    toolkit = software.toolkit_of_library()
    assert toolkit is not None
    assert toolkit >= (12, 8)


def test_pythons() -> None:
    assert said(software.python((3, 12, 1))) == (OK, "Python 3.12.1", "")
    assert said(software.python((3, 10, 9))) == (FAIL, "Python 3.10.9", "use 3.11 to 3.13")
    assert said(software.python((3, 14, 0))) == (WARN, "Python 3.14.0", "tested are 3.11 to 3.13")


def test_torch() -> None:
    assert software.torch("2.13.0+cu130", gpus=4).verdict is OK
    assert software.torch("2.13.0+cpu", gpus=0).verdict is OK
    assert said(software.torch("2.13.0+cpu", gpus=4)) == (
        FAIL,
        "2.13.0+cpu has no CUDA, and there are 4 GPUs",
        "install torch's CUDA build",
    )
    assert said(software.torch("2.8.1", gpus=4)) == (FAIL, "2.8.1", "2.9 or newer is needed")
    assert software.torch(None, gpus=0).verdict is FAIL


def test_drivers() -> None:
    """A library made with CUDA 13 does not start under a driver for 12; within a major release it does."""
    assert said(software.driver("550.54", (12, 4), (13, 0), gpus=2)) == (
        FAIL,
        "550.54, up to CUDA 12.4",
        "the kernels need a driver for CUDA 13.0 or newer: update it, or build with an older nvcc",
    )
    assert software.driver("550.54", (12, 4), (12, 8), gpus=2).verdict is OK
    assert software.driver("580.1", (13, 0), (13, 2), gpus=2).verdict is OK
    assert said(software.driver("580.1", None, (13, 0), gpus=2)) == (
        FAIL,
        "580.1, but libcuda.so.1 does not load",
        "mount the driver's libraries",
    )
    assert said(software.driver("", None, (13, 0), gpus=0)) == (OK, "none, and no GPUs", "")


def test_vllm() -> None:
    here = ["llm_allreduce", "other"]
    assert [found.verdict for found in software.vllm("0.32.0", here, {})] == [OK, OK]
    version, plugin = software.vllm("0.25.1", here, {"VLLM_PLUGINS": "other,vllm_cpu_ops"})
    assert said(version) == (
        WARN,
        "0.25.1",
        "this release is made for 0.26 to 0.33; look for our lines in the log when it starts",
    )
    assert said(plugin) == (
        WARN,
        "not loaded: VLLM_PLUGINS='other,vllm_cpu_ops' does not name it",
        "add llm_allreduce to VLLM_PLUGINS, or unset it",
    )
    assert software.vllm("0.26.0", here, {"VLLM_PLUGINS": "other, llm_allreduce"})[1].verdict is OK
    missing = software.vllm("0.32.0", ["other"], {})[1]
    assert said(missing) == (
        FAIL,
        "this environment has no entry point llm_allreduce in vllm.general_plugins",
        "install the package with pip into vLLM's environment",
    )
    assert [found.verdict for found in software.vllm(None, here, {})] == [WARN]


def test_sglang() -> None:
    here = ["llm_allreduce", "other"]
    assert [found.verdict for found in software.sglang("0.5.17", here, {})] == [OK, OK]
    assert [found.verdict for found in software.sglang("0.5.23.post1", here, {"SGLANG_PLUGINS": ""})] == [OK, OK]
    version, plugin = software.sglang("0.5.16", here, {"SGLANG_PLUGINS": "other"})
    assert said(version) == (
        WARN,
        "0.5.16",
        "this release is made for 0.5.17 to 0.5.23; look for our lines in the log when it starts",
    )
    assert said(plugin) == (
        WARN,
        "not loaded: SGLANG_PLUGINS='other' does not name it",
        "add llm_allreduce to SGLANG_PLUGINS, or unset it",
    )
    assert software.sglang("0.5.24", here, {"SGLANG_PLUGINS": "other, llm_allreduce"})[1].verdict is OK
    assert said(software.sglang("0.5.23", ["other"], {})[1]) == (
        FAIL,
        "this environment has no entry point llm_allreduce in sglang.srt.plugins",
        "install the package with pip into SGLang's environment",
    )


def test_one_engine_is_enough() -> None:
    assert [said(found) for found in software.sglang(None)] == [(OK, "not installed", "")]
    assert [said(found) for found in software.vllm(None, needed=False)] == [(OK, "not installed", "")]
    # VLLM_PLUGINS= names no plugin; SGLang takes an empty variable for none.
    assert software.vllm("0.32.0", ["llm_allreduce"], {"VLLM_PLUGINS": ""})[1].verdict is WARN


def test_this_environment_has_both_entry_points() -> None:
    groups = (software.VLLM_GROUP, software.SGLANG_GROUP)
    for group in groups:
        assert software.ENTRY_POINT in {found.name for found in importlib.metadata.entry_points(group=group)}, group


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(software.settings()[0]) == (OK, "defaults", "")
    monkeypatch.setenv("LLM_ALLREDUCE_TRANSPORT", "host")
    found, config = software.settings()
    assert said(found) == (OK, "transport host", "")
    assert config.transport is TransportChoice.HOST
    monkeypatch.setenv("LLM_ALLREDUCE_TIMEOUT", "5")
    found, config = software.settings()
    assert found.verdict is FAIL
    assert "did you mean LLM_ALLREDUCE_TIMEOUT_S?" in found.text
    assert config == AllReduceConfig()


def test_variables() -> None:
    assert software.variables({}) == []
    assert [said(found) for found in software.variables({"CUDA_VISIBLE_DEVICES": "0,1,0"})] == [
        (FAIL, "CUDA_VISIBLE_DEVICES=0,1,0 names a GPU twice", "give every rank a GPU of its own")
    ]
    assert [found.verdict for found in software.variables({"CUDA_VISIBLE_DEVICES": ""})] == [WARN]
    assert [found.verdict for found in software.variables({"CUDA_VISIBLE_DEVICES": "2,3"})] == [OK]
    assert [found.verdict for found in software.variables({"NCCL_P2P_DISABLE": "1"})] == [WARN]
    assert software.variables({"NCCL_P2P_DISABLE": "1"}, transport="host") == []
    assert [found.text for found in software.variables({"NCCL_P2P_DISABLE": "1"}, transport="peer")] == [
        "NCCL_P2P_DISABLE=1 is ignored: transport peer was set, and overrides it"
    ]
    segments = software.variables({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    assert [found.verdict for found in segments] == [OK]
    assert [found.verdict for found in software.variables({"CUDA_LAUNCH_BLOCKING": "1"})] == [WARN]
    assert software.variables({"NCCL_DEBUG": "INFO"})[0].text.startswith("NCCL_DEBUG=INFO: of NCCL")


# -- limits ------------------------------------------------------------------------------------------------------------


def shm(available: int | None, free: int, total: int, *, needed: bool = True) -> Finding:
    state = SimpleNamespace(f_bavail=free // 4096, f_blocks=total // 4096, f_frsize=4096)
    return limits.shared_memory(
        48 * MIB,
        needed=needed,
        available=lambda: available,
        statvfs=lambda _: state,  # type: ignore[arg-type, return-value]
    )


def test_shared_memory() -> None:
    """Ranks take it from the machine's memory; /dev/shm is the engine's and NCCL's."""
    assert said(shm(6 << 30, 2 << 30, 4 << 30)) == (
        OK,
        "6 GiB available; all ranks together want 48 MiB; /dev/shm, for the engine and NCCL, has 2 GiB free of 4 GiB",
        "",
    )
    assert shm(None, 2 << 30, 4 << 30).text.startswith("memory of unknown size available; all")
    for free, total in ((64 * MIB, 64 * MIB), (16 * MIB, 4 << 30)):
        docker = shm(6 << 30, free, total)
        assert docker.verdict is WARN
        assert docker.advice.startswith("start the container with --ipc=host or --shm-size=1g")
    tiny = shm(16 * MIB, 2 << 30, 4 << 30)
    assert tiny.verdict is WARN
    assert tiny.text == "16 MiB available; all ranks together want 48 MiB; the engine's NCCL would run instead"
    assert tiny.advice.endswith("or set LLM_ALLREDUCE_WORKSPACE_BYTES (per rank) lower")
    assert shm(16 * MIB, 1, 1, needed=False).text.endswith("wanted only where GPUs have no peer access")
    missing = limits.shared_memory(48 * MIB, needed=True, available=lambda: 6 << 30, folder="/nowhere")
    assert missing.verdict is WARN
    assert missing.text.endswith("/nowhere, for the engine and NCCL: No such file or directory")


def test_locked_memory() -> None:
    assert said(limits.pinned_memory(48 * MIB, needed=True, limit=limits.UNLIMITED)) == (OK, "unlimited", "")
    assert limits.pinned_memory(48 * MIB, needed=False, limit=64 << 10).verdict is OK
    low = limits.pinned_memory(48 * MIB, needed=True, limit=8 * MIB)
    assert low.verdict is WARN
    assert low.text == "limited to 8 MiB (ulimit -l), 48 MiB are pinned; most drivers do not count them"
    assert "--ulimit memlock=-1" in low.advice


@pytest.mark.parametrize(
    ("limit", "used", "verdict", "text"),
    [
        ("max", 5 << 30, OK, "none; 5 GiB in use"),
        (str(8 << 30), 1 << 30, OK, "7 GiB left of 8 GiB"),
        (str(128 * MIB), 100 * MIB, WARN, "28 MiB left of 128 MiB; workspaces want 48 MiB"),
    ],
)
def test_memory_limit(tmp_path: Path, limit: str, used: int, verdict: Verdict, text: str) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    found = limits.memory_limit(48 * MIB, tmp_path)
    assert (found.verdict, found.text) == (verdict, text)


def test_memory_limit_of_the_older_control_groups(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(str(64 * MIB))
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("0")
    assert limits.memory_limit(48 * MIB, tmp_path).verdict is WARN
    assert said(limits.memory_limit(48 * MIB, tmp_path / "none")) == (OK, "no control group says one", "")


def test_containers(tmp_path: Path) -> None:
    assert limits.container(tmp_path, {}).text == "none that is known"
    assert limits.container(tmp_path, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).text.startswith("Kubernetes: keep all")
    (tmp_path / ".dockerenv").touch()
    assert limits.container(tmp_path, {}).text.startswith("Docker: keep all ranks of a group in this one container")
