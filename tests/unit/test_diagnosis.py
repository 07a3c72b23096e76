"""llm-allreduce check, on machines that nobody has: the verdict and the advice, word for word."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from llm_allreduce_plugin import AllReduceConfig, NodeTopology, diagnosis
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.config import TransportChoice
from llm_allreduce_plugin.diagnosis import Finding, Verdict, hardware, limits, proof, software
from llm_allreduce_plugin.diagnosis.finding import guarded, ok
from llm_allreduce_plugin.diagnosis.hardware import GpuState
from llm_allreduce_plugin.diagnosis.proof import Proof, Task

FOLDER = Path(__file__).parents[2] / "configs" / "topologies"
RUNNER = CliRunner()
OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL
MIB = 1 << 20


def load(name: str) -> NodeTopology:
    return NodeTopology.from_json(FOLDER / f"{name}.json")


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
    assert said(version) == (WARN, "0.25.1", "tested are 0.26 to 0.33; look for our lines in the log when it starts")
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
        "tested are 0.5.17 to 0.5.23; look for our lines in the log when it starts",
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
        "NCCL_P2P_DISABLE=1 does not count for transport peer, which was asked for by name"
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


# -- hardware ----------------------------------------------------------------------------------------------------------


def test_gpus_and_links() -> None:
    assert said(hardware.gpus(load("h200_x4_nvswitch"))) == (OK, "4 x NVIDIA H200 (sm_90)", "")
    none = hardware.gpus(NodeTopology(note="no NVML: NVML Shared Library Not Found"))
    assert none.verdict is WARN
    assert none.text == "none (no NVML: NVML Shared Library Not Found)"
    h100 = load("h100_x8_nvswitch")
    mixed = h100.model_copy(update={"gpus": (*h100.gpus[:7], load("l40s_x8_two_numa").gpus[7])})
    assert hardware.gpus(mixed).verdict is WARN
    assert hardware.gpus(mixed).text.endswith(" and 1 x NVIDIA L40S (sm_89)")
    one = NodeTopology(gpus=h100.gpus[:1], links=(("X",),), p2p=(("X",),))
    assert hardware.gpus(one).advice == "nothing to do at tensor parallel 1: there is nobody to reduce with"
    assert hardware.links(load("h200_x4_nvswitch")).text.startswith("NV18 through NVSwitch; the driver says")
    without = hardware.links(load("rtx4090_x8_no_p2p"))
    assert without.verdict is WARN
    assert without.text.endswith("GPU0 and GPU1 have no peer access (CNS: chipset not supported)")
    assert without.advice.startswith("nothing: all-reduces go through pinned host memory")


def test_fabric_and_multicast() -> None:
    h100 = load("h100_x8_nvswitch")
    good = hardware.multicast(h100, {"NCCL_NVLS_ENABLE": "0"})
    assert good.verdict is OK
    assert "switched off by NCCL_NVLS_ENABLE=0" in good.text
    fabric = h100.gpus[0].fabric
    assert fabric is not None
    waiting = h100.gpus[0].model_copy(update={"fabric": fabric.model_copy(update={"state": "in progress"})})
    bad = hardware.multicast(h100.model_copy(update={"gpus": (waiting, *h100.gpus[1:])}), {})
    assert bad.verdict is FAIL
    assert bad.advice == "NVLinks do not work before it is complete: is nvidia-fabricmanager running?"


def test_sharing(tmp_path: Path) -> None:
    free = GpuState(0, mig=False, compute_mode="default", free_bytes=80 << 30, total_bytes=80 << 30)
    assert [found.verdict for found in hardware.sharing([free], {}, tmp_path)] == [OK]
    states = [free, GpuState(1, mig=True), GpuState(2, compute_mode="prohibited"), GpuState(3, free_bytes=100 * MIB)]
    (tmp_path / "77").mkdir()
    (tmp_path / "77" / "comm").write_text("nvidia-cuda-mps\n")
    found = hardware.sharing(states, {}, tmp_path)
    assert [said(one)[:2] for one in found] == [
        (WARN, "MIG is on for GPU 1: its instances cannot reach each other's memory"),
        (FAIL, "compute mode of GPU 2 is prohibited"),
        (WARN, "GPU 3 has 100 MiB free"),
        (WARN, "MPS is in use: a rank's kernel that waits may keep others of the same GPU from running"),
    ]
    assert all(one.advice for one in found)
    assert hardware.sharing([], {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/mps"}, tmp_path / "none")[0].verdict is WARN


def test_broken_nvml_tells_nothing_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def nvmlInit(self) -> None: ...
        def nvmlDeviceGetCount(self) -> int:
            return 2

        def __getattr__(self, name: str) -> Any:
            def refuse(*_: object) -> None:
                raise RuntimeError(name)

            return refuse

    monkeypatch.setitem(sys.modules, "pynvml", Broken())
    assert hardware.read_states() == [GpuState(0), GpuState(1)]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert hardware.read_states() == []


def bridge(acs_control: int) -> bytes:
    """A bridge's configuration space: at 0x100 a capability of another kind, at 0x148 ACS."""
    config = bytearray(4096)
    config[0x100:0x104] = (0x0001 | 1 << 16 | 0x148 << 20).to_bytes(4, "little")
    config[0x148:0x14C] = (0x000D | 1 << 16).to_bytes(4, "little")
    config[0x14E:0x150] = acs_control.to_bytes(2, "little")
    return bytes(config)


def test_acs() -> None:
    assert hardware.has_acs_redirect(bridge(0x0004)) is True
    assert hardware.has_acs_redirect(bridge(0x0011)) is False
    assert hardware.has_acs_redirect(bytes(64)) is None, "only root sees more"
    assert hardware.has_acs_redirect(bytes(4096)) is False
    loop = bytearray(bridge(4))
    loop[0x100:0x104] = (0x0001 | 1 << 16 | 0x100 << 20).to_bytes(4, "little")
    assert hardware.has_acs_redirect(bytes(loop)) is False, "a list that bites its tail ends"


def test_pcie_path(tmp_path: Path) -> None:
    def device(name: str, kind: str, config: bytes) -> None:
        folder = tmp_path / "bus" / "pci" / "devices" / name
        folder.mkdir(parents=True)
        (folder / "class").write_text(kind)
        (folder / "config").write_bytes(config)

    l40s = load("l40s_x8_two_numa")
    assert said(hardware.peer_path(l40s, tmp_path)) == (OK, "IOMMU off; ACS redirects peer traffic at 0 bridges", "")
    device("0000:00:01.0", "0x060400\n", bytes(64))
    assert "an unknown number of bridges (root can tell)" in hardware.peer_path(l40s, tmp_path).text
    device("0000:00:02.0", "0x060400\n", bridge(0x0C))
    device("0000:00:03.0", "0x030200\n", bridge(0x0C))  # a GPU
    (tmp_path / "class" / "iommu" / "dmar0").mkdir(parents=True)
    found = hardware.peer_path(l40s, tmp_path)
    assert found.verdict is WARN
    assert found.text == "IOMMU on; ACS redirects peer traffic at 1 bridges"
    assert found.advice.startswith("if peer access is not proved below: iommu=pt")
    assert hardware.peer_path(load("h200_x4_nvswitch"), tmp_path).verdict is OK


# -- proofs ------------------------------------------------------------------------------------------------------------

GOOD, BAD, HUNG = Proof("proved", "8 ranks"), Proof("failed", "bytes were lost"), Proof("hung", "no answer")


@pytest.mark.parametrize(
    ("node", "transport", "peer", "host", "verdicts"),
    [
        ("h100_x8_nvswitch", "auto", GOOD, GOOD, [OK, OK]),
        ("h100_x8_nvswitch", "auto", BAD, GOOD, [WARN, OK]),  # host memory takes over
        ("h100_x8_nvswitch", "auto", BAD, BAD, [FAIL, FAIL]),
        ("h100_x8_nvswitch", "auto", GOOD, BAD, [OK, WARN]),  # nobody needs it
        ("h100_x8_nvswitch", "auto", HUNG, GOOD, [FAIL, OK]),  # the engine would hang too
        ("h100_x8_nvswitch", "host", GOOD, GOOD, [OK]),
        ("rtx4090_x8_no_p2p", "auto", GOOD, GOOD, [OK]),
        ("rtx4090_x8_no_p2p", "auto", GOOD, BAD, [FAIL]),
        ("no_gpu", "auto", GOOD, GOOD, [OK]),
        ("no_gpu", "auto", BAD, GOOD, [FAIL]),
    ],
)
def test_what_a_proof_means(node: str, transport: str, peer: Proof, host: Proof, verdicts: list[Verdict]) -> None:
    tasks: list[Task] = []

    def runner(task: Task) -> Proof:
        tasks.append(task)
        return host if task.transport is TransportChoice.HOST else peer

    topology = load(node)
    found = proof.findings(topology, AllReduceConfig(transport=transport, workspace_bytes=4 << 20), runner)
    assert [one.verdict for one in found] == verdicts
    assert all(one.advice for one in found if one.verdict is not OK)
    assert all(task.ranks == (8 if topology.gpus else 2) for task in tasks)
    assert all(task.workspace_bytes == 4 << 20 for task in tasks)
    if node == "rtx4090_x8_no_p2p":
        assert [task.transport for task in tasks] == ["host"], "the driver has ruled peer access out"


def test_the_largest_group_that_kernels_exist_for() -> None:
    assert [proof.largest_group(gpus) for gpus in (0, 1, 2, 3, 8, 12, 16, 72)] == [0, 0, 2, 3, 8, 12, 16, 72]


TASK = Task("cpu", 2, TransportChoice.AUTO)


def fake(script: str) -> list[str]:
    return [sys.executable, "-c", "import json, sys, time, subprocess\n" + script]


def test_a_hang_ends_at_the_deadline_with_all_its_processes(tmp_path: Path) -> None:
    """The child's own children too, as ranks are."""
    script = f"""
print(json.dumps({{"step": "ranks writing"}}), flush=True)
child = subprocess.Popen(["sleep", "600"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    started = time.monotonic()
    found = proof.run(TASK, timeout_s=2.0, command=fake(script))
    assert time.monotonic() - started < 9
    assert found == Proof("hung", "no answer within 2 s; the last step was: ranks writing")
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":  # ended; whoever adopts orphans here has not looked yet
            return
        time.sleep(0.1)
    pytest.fail("the rank lives on")


def test_answers_of_the_child() -> None:
    lost = 'print("noise"); print(json.dumps({"answer": "bytes were lost"}))'
    assert proof.run(TASK, command=fake(lost)) == Proof("failed", "bytes were lost")
    crash = 'print(json.dumps({"step": "x"})); sys.exit("no such thing")'
    assert proof.run(TASK, command=fake(crash)) == Proof("failed", "the ranks ended early: no such thing")
    silent = "import os; os._exit(7)"
    assert proof.run(TASK, command=fake(silent)) == Proof("failed", "the ranks ended early: exit code 7")


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_probe_that_breaks_is_a_finding() -> None:
    def broken() -> Finding:
        message = "no such file"
        raise OSError(message)

    (found,) = guarded("anything", broken)
    assert found.verdict is WARN
    assert found.text == "cannot be looked at: OSError: no such file"
    assert guarded("anything", lambda: ok("a", "b")) == [ok("a", "b")]


def test_exit_codes_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    result = RUNNER.invoke(app, ["check", "--no-proof", "--json"])
    document = json.loads(result.output)
    names = {row["name"] for row in document["findings"]}
    assert {"package", "Python", "torch", "driver", "GPUs", "shared memory", "vLLM", "settings", "what runs"} <= names
    assert result.exit_code == (0 if document["works"] else 1)
    assert not document["proved"]
    monkeypatch.setenv("LLM_ALLREDUCE_STRATEGY", "FASTEST")
    result = RUNNER.invoke(app, ["check", "--no-proof"])
    assert result.exit_code == 1
    assert "FAIL  settings" in result.output
    assert "-> correct it: the engine refuses to start with it" in result.output
    assert " FAIL, " in result.output


def test_proofs_are_printed_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Finding("peer access", FAIL, "bytes were lost", "look at the BIOS")
    monkeypatch.setattr(diagnosis, "look", lambda: ([ok("GPUs", "2 x test")], NodeTopology()))
    monkeypatch.setattr(diagnosis, "prove", lambda _: [bad])
    result = RUNNER.invoke(app, ["check"])
    assert result.exit_code == 1
    assert result.output.splitlines()[:3] == [
        "OK    GPUs            2 x test",
        "FAIL  peer access     bytes were lost",
        "                      -> look at the BIOS",
    ]


def test_a_library_that_does_not_load_is_said_without_a_traceback() -> None:
    script = "import sys; sys.modules['llm_allreduce_plugin._C'] = None; import llm_allreduce_plugin.cli"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("FAIL  package  llm_allreduce_plugin")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("llm-allreduce ch", 1, ["check"]),
        ("llm-allreduce explain --strategy tw", 3, ["twoshot"]),
        ("llm-allreduce explain --strategy LOW", 3, ["LOWPRECISION"]),
        ("llm-allreduce topo --topo", 2, ["--topology"]),
        (f"llm-allreduce topo --topology {FOLDER}/gb", 3, [f"{FOLDER}/gb200_x72_nvl72.json"]),
    ],
)
def test_the_shell_completes(words: str, position: int, expected: list[str]) -> None:
    script = "import sys; sys.argv[0] = 'llm-allreduce'\nfrom llm_allreduce_plugin.cli import main\nmain()"
    environment = {
        **os.environ,
        "COMP_WORDS": words,
        "COMP_CWORD": str(position),
        "_LLM_ALLREDUCE_COMPLETE": "complete_bash",
    }
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert result.stdout.split() == expected, result.stderr
