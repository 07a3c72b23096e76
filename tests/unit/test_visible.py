"""Which GPUs a process sees, in which order CUDA counts them, and what commands say of those that are hidden."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_allreduce_plugin import NodeTopology, diagnosis
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.diagnosis import Verdict, hardware
from llm_allreduce_plugin.diagnosis.hardware import GpuState
from llm_allreduce_plugin.topology import Gpu, cuda_order, view_of
from tests.unit.test_topology import load

RUNNER = CliRunner()
H200 = load("h200_x4_nvswitch")
NO_P2P = load("rtx4090_x8_no_p2p")


def mixed(*names: str) -> NodeTopology:
    """A node of GPUs of these kinds, in PCI bus order, without NVLink or peer access."""
    count = len(names)
    gpus = tuple(
        Gpu(index=i, name=f"NVIDIA {name}", architecture=75 if name == "T4" else 90, uuid=f"GPU-{i}{name.lower()}")
        for i, name in enumerate(names)
    )
    links, p2p = (
        tuple(tuple("X" if i == j else other for j in range(count)) for i in range(count)) for other in ("SYS", "CNS")
    )
    return NodeTopology(source="a test", gpus=gpus, links=links, p2p=p2p)


T4_FIRST = mixed("T4", "H100", "T4", "H100")
UUIDS = [gpu.uuid for gpu in T4_FIRST.gpus]
FASTEST = [UUIDS[1], UUIDS[3], UUIDS[0], UUIDS[2]]  # as CUDA counts by itself


def never() -> Sequence[str] | None:
    pytest.fail("CUDA need not be asked")


def unknown() -> Sequence[str] | None:
    return None


def indices(node: NodeTopology, environment: dict[str, str], ask: Any = never) -> list[int]:
    return [gpu.index for gpu in view_of(node, environment, ask).topology.gpus]


def test_gpus_that_are_alike_have_one_order() -> None:
    for order in ({}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}):
        assert indices(H200, order) == [0, 1, 2, 3]
        assert indices(H200, order | {"CUDA_VISIBLE_DEVICES": "3,1"}) == [3, 1]
        assert view_of(H200, order, never).notes == ()


def test_gpus_that_differ_are_counted_as_cuda_counts_them() -> None:
    """Its default is fastest first; NVML's order is that of the PCI bus, and CUDA's when that is asked for."""
    bus, fastest = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert indices(T4_FIRST, bus | {"CUDA_VISIBLE_DEVICES": "0,1"}) == [0, 1]
    for order in ({}, fastest):
        assert indices(T4_FIRST, order, lambda: FASTEST) == [1, 3, 0, 2]
        assert indices(T4_FIRST, order | {"CUDA_VISIBLE_DEVICES": "0,1"}, lambda: FASTEST) == [1, 3]
        assert indices(T4_FIRST, order | {"CUDA_VISIBLE_DEVICES": "2,GPU-3"}, lambda: FASTEST) == [0, 3]


@pytest.mark.parametrize("answer", [None, [], ["GPU-of another node"], FASTEST[:3], [*FASTEST, "GPU-9"]])
def test_an_order_that_nobody_knows_is_said_to_be_assumed(answer: list[str] | None) -> None:
    view = view_of(T4_FIRST, {"CUDA_VISIBLE_DEVICES": "0,1"}, lambda: answer)
    assert [gpu.index for gpu in view.topology.gpus] == [0, 1]
    (note,) = view.notes
    assert "the GPUs differ, and CUDA could not be asked" in note
    assert "set CUDA_DEVICE_ORDER=PCI_BUS_ID" in note
    by_name = view_of(T4_FIRST, {"CUDA_VISIBLE_DEVICES": "GPU-3,GPU-0"}, lambda: answer)
    assert [gpu.index for gpu in by_name.topology.gpus] == [3, 0]
    assert by_name.notes == (), "names leave nothing to assume"


@given(st.permutations(range(6)), st.lists(st.integers(0, 7), max_size=6))
def test_numbers_count_in_cudas_order(order: list[int], chosen: list[int]) -> None:
    node = mixed("T4", "H100", "T4", "H100", "T4", "H100")
    expected = []
    for number in chosen:
        if number >= 6 or order[number] in expected:
            break
        expected.append(order[number])
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, chosen))}
    assert indices(node, environment, lambda: [node.gpus[i].uuid for i in order]) == expected


def test_cuda_is_asked_in_a_process_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every GPU in sight, whatever is hidden here; and never for long."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    script = "import os, sys; print(os.environ.get('CUDA_VISIBLE_DEVICES')); print('GPU-b'); print('GPU-a')"
    assert cuda_order.ask(command=(sys.executable, "-c", script)) == ["None", "GPU-b", "GPU-a"]
    for broken in ("import sys; sys.exit(1)", "print('GPU-a'); import os; os.abort()", "import time; time.sleep(60)"):
        assert cuda_order.ask(command=(sys.executable, "-c", broken), timeout_s=1.0) is None
    assert cuda_order.ask(command=(str(tmp_path / "none"),)) is None


def test_what_asks_cuda_runs_without_a_driver() -> None:
    """As here, where there is none: it says so by its exit code."""
    result = subprocess.run([sys.executable, "-c", cuda_order.PROGRAM], capture_output=True, text=True, timeout=60)
    assert result.returncode in (0, 1)
    assert result.stderr == ""
    lines = result.stdout.split()
    assert (result.returncode == 1) == (lines == [])
    assert all(line.startswith("GPU-") for line in lines)


def test_names_are_numbers_of_gpus_and_not_positions() -> None:
    seen = view_of(NO_P2P, {"CUDA_VISIBLE_DEVICES": "5,2"}, never).topology
    assert seen.p2p_fault() == "GPU5 and GPU2 have no peer access (CNS: chipset not supported)"
    assert "GPU5 and GPU2" in hardware.links(seen).text
    hosts = load("gb200_x72_nvl72").subset([0, 71])
    assert [hosts.name_of(position) for position in (0, 1)] == ["GPU0 of host 0", "GPU71 of host 17"]


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets commands find a recorded node as if NVML spoke of it."""
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def pretend(topology: NodeTopology, visible: str | None) -> None:
        monkeypatch.setattr(NodeTopology, "detect", classmethod(lambda _cls: topology))
        states = [GpuState(gpu.index, mig=gpu.index == 0, free_bytes=80 << 30) for gpu in topology.gpus]
        monkeypatch.setattr(hardware, "read_states", lambda: states)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return pretend


def run(*arguments: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "300"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_topo_shows_what_is_hidden_and_does_not_count_it(node: Any) -> None:
    node(H200, "3,1")
    code, output = run("topo")
    assert code == 0
    assert output.splitlines()[0].split() == ["GPU0", "GPU1", "GPU2", "GPU3", "NUMA", "CUDA"]
    assert [line.split()[-1] for line in output.splitlines()[1:5]] == ["hidden", "cuda:1", "hidden", "cuda:0"]
    assert "Strategies for a group of 2 through" in output
    assert "CUDA_VISIBLE_DEVICES='3,1' hides 2 of 4 GPUs" in output
    code, output = run("topo", "--tp", "3")
    assert code == 2
    assert "world size 3: this process sees 2 of the node's 4 GPUs (CUDA_VISIBLE_DEVICES='3,1')" in output
    document = json.loads(run("topo", "--json")[1])
    assert len(document["gpus"]) == 4, "a record is of the node, whoever looks"


def test_topo_without_the_variable_is_as_before(node: Any) -> None:
    node(H200, None)
    _, output = run("topo")
    assert output.splitlines()[0].split() == ["GPU0", "GPU1", "GPU2", "GPU3", "NUMA"]
    assert "hid" not in output


def test_topo_and_explain_say_how_cuda_counts(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node(T4_FIRST, None)
    monkeypatch.setattr(cuda_order, "ask", lambda: FASTEST)
    _, output = run("topo")
    assert [line.split()[-1] for line in output.splitlines()[1:5]] == ["cuda:2", "cuda:0", "cuda:3", "cuda:1"]
    _, output = run("explain", "--tp", "2")
    assert "# 2 x NVIDIA H100 (this node)" in output, "the two fastest, which CUDA counts first"
    assert "# ranks 0 to 1 are on GPU1, GPU3" in output
    monkeypatch.setattr(cuda_order, "ask", lambda: None)
    for command in ("topo", "explain", "check"):
        output = run(command, "--no-proof")[1] if command == "check" else run(command)[1]
        assert "CUDA could not be asked" in " ".join(output.split()), output


@pytest.mark.parametrize("value", ("", "-1", "none", "9", "-1,0"))
def test_when_nothing_is_visible_nobody_speaks_of_cpu_ranks(node: Any, value: str) -> None:
    node(H200, value)
    said = f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU"
    code, output = run("explain")
    assert code == 2
    assert f"error: no GPU is visible: {said}" in output
    assert "unset it, or give --cpu or --topology" in output
    code, output = run("check", "--json")
    document = json.loads(output)
    assert code == 1
    assert not document["works"]
    (gpus,) = [row for row in document["findings"] if row["name"] == "GPUs"]
    assert gpus["verdict"] == Verdict.FAIL
    assert said in gpus["text"]
    assert {"what runs", "CPU ranks", "proof"}.isdisjoint(row["name"] for row in document["findings"])
    code, output = run("check")
    assert "all-reduces work here" not in output
    assert "CPU ranks" not in output
    assert run("explain", "--cpu")[0] == 0
    code, output = run("topo")
    assert code == 0
    assert output.count("hidden") >= 4
    assert said in output


def test_check_speaks_of_gpus_that_are_visible(node: Any) -> None:
    node(H200, "3,1")
    found, seen = diagnosis.look()
    assert [gpu.index for gpu in seen.gpus] == [3, 1]
    assert [one.text for one in found if one.name == "GPU sharing"] == ["no MIG, no MPS, memory free"], (
        "GPU 0 is hidden"
    )
    (runs,) = [one.text for one in found if one.name == "what runs"]
    assert "over 2 ranks" in runs


def test_instances_of_gpus_are_not_taken_for_hidden_ones() -> None:
    view = view_of(H200, {"CUDA_VISIBLE_DEVICES": "MIG-12345678-0000-0000-0000-000000000000"}, never)
    assert view.topology.gpus == ()
    assert "names a MIG instance" in view.topology.note


def test_without_gpus_there_is_nothing_to_hide() -> None:
    nothing = NodeTopology(note="no NVML: none")
    for environment in ({}, {"CUDA_VISIBLE_DEVICES": ""}):
        assert view_of(nothing, environment, never).topology == nothing
