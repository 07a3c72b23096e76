"""llm-allreduce check, on machines that nobody has: what is said of GPUs and links, word for word."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from llm_allreduce_plugin import NodeTopology
from llm_allreduce_plugin.diagnosis import hardware
from llm_allreduce_plugin.diagnosis.hardware import GpuState
from tests.unit.test_diagnosis import FAIL, MIB, OK, WARN, said

FOLDER = Path(__file__).parents[2] / "configs" / "topologies"


def load(name: str) -> NodeTopology:
    return NodeTopology.from_json(FOLDER / f"{name}.json")


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
    assert hardware.gpus(one).advice == "nothing to do at tensor parallel 1, which has no all-reduces"
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
