"""NodeTopology: files, the recorded nodes, and a machine without NVML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llm_allreduce_plugin import NodeTopology, TopologyError
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.diagnosis.finding import Verdict
from llm_allreduce_plugin.diagnosis.hardware import left_out
from llm_allreduce_plugin.group.capabilities import group_facts, strategy_table
from llm_allreduce_plugin.group.facts import p2p_fault
from llm_allreduce_plugin.topology import nvml, visible

FOLDER = Path(__file__).parents[2] / "configs" / "topologies"
FILES = sorted(FOLDER.glob("*.json"))
RUNNER = CliRunner()


def load(name: str) -> NodeTopology:
    return NodeTopology.from_json(FOLDER / f"{name}.json")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recorded_topologies_round_trip(path: Path, tmp_path: Path) -> None:
    topology = NodeTopology.from_json(path)
    assert topology.source
    copy = tmp_path / "copy.json"
    copy.write_text(topology.model_dump_json())
    assert NodeTopology.from_json(copy) == topology


def test_the_nodes_asked_for_are_there() -> None:
    expected = {
        "h200_x4_nvswitch": (4, True, 1, 90),
        "h100_x8_nvswitch": (8, True, 2, 90),
        "l40s_x8_two_numa": (8, False, 2, 89),
        "rtx4090_x8_no_p2p": (8, False, 2, 89),
        "gb200_x72_nvl72": (72, True, 2, 100),
    }
    for name, (gpus, nvswitch, domains, architecture) in expected.items():
        topology = load(name)
        assert len(topology.gpus) == gpus
        assert topology.nvswitch is nvswitch
        assert topology.has_nvlink is nvswitch
        assert len({gpu.numa_node for gpu in topology.gpus}) == domains
        assert {gpu.architecture for gpu in topology.gpus} == {architecture}
    assert load("gb200_x72_nvl72").hosts == 18
    assert load("no_gpu").gpus == ()


def runnable(name: str, world_size: int | None = None) -> set[str]:
    return {str(strategy) for strategy, reason in strategy_table(group_facts(load(name), world_size)) if reason is None}


def test_what_can_run_where() -> None:
    kernels = {"ONESHOT", "TWOSHOT", "MINLATENCY", "LOWPRECISION", "NCCL"}
    assert runnable("h200_x4_nvswitch") == kernels
    assert runnable("l40s_x8_two_numa") == kernels
    assert runnable("rtx4090_x8_no_p2p") == kernels, "through host memory"
    assert runnable("no_gpu") == {"NCCL"}
    assert runnable("gb200_x72_nvl72") == (kernels | {"MNNVL"}) - {"LOWPRECISION"}, "over one NVLink domain"
    assert runnable("gb200_x72_nvl72", 4) == kernels
    assert str(group_facts(load("rtx4090_x8_no_p2p")).transport) == "host"
    with pytest.raises(ValueError, match="world size 5: the topology has 4 GPUs"):
        group_facts(load("h200_x4_nvswitch"), 5)


def test_what_a_process_sees_of_a_node() -> None:
    """CUDA_VISIBLE_DEVICES as the driver reads it."""
    node = load("h200_x4_nvswitch")

    def indices(text: str) -> list[int]:
        return [gpu.index for gpu in visible(node, {"CUDA_VISIBLE_DEVICES": text}).gpus]

    assert visible(node, {}) == node
    assert indices("3,1") == [3, 1]
    assert indices("0, 2,7,1") == [0, 2], "up to the first that is not there"
    assert indices("1,1,2") == [1], "nor twice"
    assert indices("GPU-00000000-0000-0000-0000-000000000002,0") == [2, 0]
    assert indices("GPU-0") == [], "which of them?"
    none = visible(node, {"CUDA_VISIBLE_DEVICES": ""})
    assert none.gpus == ()
    assert none.note == "CUDA_VISIBLE_DEVICES='' hides every GPU"
    cards = visible(load("l40s_x8_two_numa"), {"CUDA_VISIBLE_DEVICES": "4,0,1"})
    assert cards.links == (("X", "SYS", "SYS"), ("SYS", "X", "PIX"), ("SYS", "PIX", "X"))
    assert NodeTopology.model_validate(cards.model_dump()) == cards


def broken(change: Any) -> dict[str, Any]:
    document = json.loads((FOLDER / "h200_x4_nvswitch.json").read_text())
    change(document)
    return document


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda d: d["links"].pop(), ["links must be a 4 x 4 matrix"]),
        (lambda d: d["links"][0].__setitem__(1, "WIFI"), ["links[0][1]='WIFI'", "PIX"]),
        (lambda d: d["links"][0].__setitem__(1, "SYS"), ["links[0][1]='SYS'", "must be equal"]),
        (lambda d: d["p2p"][2].__setitem__(1, "YES"), ["p2p[2][1]='YES'", "OK"]),
        (lambda d: d["gpus"][0].pop("name"), ["gpus.0.name", "required"]),
        (lambda d: d.__setitem__("cards", 4), ["cards", "not permitted"]),
    ],
)
def test_bad_files_name_file_and_field(change: Any, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(TopologyError) as caught:
        NodeTopology.from_json(path)
    assert "bad.json" in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ("", "{", "[]", "null"))
def test_malformed_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(TopologyError, match=r"bad\.json"):
        NodeTopology.from_json(path)
    with pytest.raises(TopologyError, match="cannot be read"):
        NodeTopology.from_json(tmp_path / "missing.json")


class FakeNvmlError(Exception):
    pass


class FakeNvml:
    """Two GPUs joined by four NVLinks; every other question is refused, as old drivers do."""

    NVMLError = FakeNvmlError

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link > 3:
            raise FakeNvmlError
        return 1

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, index: int) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: object) -> None:
            raise FakeNvmlError(name)

        return refuse


def test_detection_survives_a_driver_that_answers_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml())
    monkeypatch.setattr(nvml, "_attribute_by_bus_id", lambda _attribute: {})
    topology = NodeTopology.detect()
    assert topology.links == (("X", "NV4"), ("NV4", "X"))
    assert topology.p2p == (("X", "OK"), ("OK", "X"))
    assert topology.gpus[0].name == "unknown"
    assert topology.gpus[0].architecture is None
    assert topology.gpus[0].multiprocessors is None
    assert topology.gpus[0].multicast is None


def test_a_lost_gpu_is_left_out_and_the_others_keep_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneLost(FakeNvml):
        def nvmlDeviceGetCount(self) -> int:
            return 3

        def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
            if index == 1:
                message = "GPU is lost"
                raise FakeNvmlError(message)
            return index

    monkeypatch.setitem(__import__("sys").modules, "pynvml", OneLost())
    monkeypatch.setattr(nvml, "_attribute_by_bus_id", lambda _attribute: {})
    topology = NodeTopology.detect()
    assert [gpu.index for gpu in topology.gpus] == [0, 2]
    assert topology.links == (("X", "NV4"), ("NV4", "X"))
    assert topology.note == "NVML gives no access to GPU 1 of 3: lost, or not for this process"
    finding = left_out(topology)
    assert finding is not None
    assert (finding.verdict, finding.text) == (Verdict.WARN, topology.note)
    assert left_out(load("h200_x4_nvswitch")) is None


def test_detection_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoNvml(FakeNvml):
        def nvmlInit(self) -> None:
            message = "NVML Shared Library Not Found"
            raise FakeNvmlError(message)

    monkeypatch.setitem(__import__("sys").modules, "pynvml", NoNvml())
    topology = NodeTopology.detect()
    assert topology.gpus == ()
    assert "NVML Shared Library Not Found" in topology.note
    assert p2p_fault(topology) is None


def test_topo_prints_the_matrix_and_the_reasons() -> None:
    result = RUNNER.invoke(app, ["topo", "--from", str(FOLDER / "l40s_x8_two_numa.json")])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split() == [f"GPU{i}" for i in range(8)] + ["NUMA"]
    assert lines[1].split() == ["GPU0", "X", "PIX", "NODE", "NODE", "SYS", "SYS", "SYS", "SYS", "0"]
    assert any(line.split()[:2] == ["ONESHOT", "yes"] for line in lines)
    assert any(line.split()[:2] == ["MINLATENCY", "yes"] for line in lines)
    assert any(line.split()[:2] == ["LOWPRECISION", "yes"] for line in lines)


def test_topo_json_can_be_read_back(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["topo", "--json", "--from", str(FOLDER / "h100_x8_nvswitch.json")])
    path = tmp_path / "copy.json"
    path.write_text(result.output)
    assert NodeTopology.from_json(path) == load("h100_x8_nvswitch")


def test_topo_here_and_errors(tmp_path: Path) -> None:
    assert RUNNER.invoke(app, ["topo"]).exit_code == 0
    result = RUNNER.invoke(app, ["topo", "--from", str(tmp_path / "none.json")])
    assert result.exit_code == 2
    assert "none.json: cannot be read" in result.output
    assert RUNNER.invoke(app, ["topo", "--from", str(FOLDER / "no_gpu.json"), "--tp", "4"]).exit_code == 2
    assert RUNNER.invoke(app, ["--version"]).exit_code == 0
