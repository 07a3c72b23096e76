"""Topology files from elsewhere: whatever lies there, the answer is a topology that makes sense, or names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_allreduce_plugin import NodeTopology, TopologyError
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.topology import nvml
from tests.unit.test_topology import FOLDER, FakeNvml, broken

RUNNER = CliRunner()
GOOD = (FOLDER / "h200_x4_nvswitch.json").read_text()
ESCAPE = "\x1b[31m"


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


POISON: dict[str, Callable[[Path], object]] = {
    "UTF-16": lambda path: path.write_text(GOOD, encoding="utf-16"),
    "Latin-1": lambda path: path.write_bytes(b'{"source": "caf\xe9", "gpus": []}'),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "a terabyte": _sparse,
    "deep": lambda path: path.write_text("[" * 100_000),
    "digits": lambda path: path.write_text('{"gpus": [], "driver": ' + "9" * 5000 + "}"),
    "number for a list": lambda path: path.write_text('{"gpus": 4}'),
    "half": lambda path: path.write_text(GOOD[:200]),
    "nothing known": lambda path: path.write_text("{}"),
    "text": lambda path: path.write_text('"gpus"'),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", list(POISON))
def test_poisoned_files_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "node.json"
    POISON[kind](path)
    with pytest.raises(TopologyError, match=r"topology file \S*node\.json"):
        NodeTopology.from_json(path)
    for command in (["topo", "--topology"], ["explain", "--topology"]):
        result = RUNNER.invoke(app, [*command, str(path)])
        assert result.exit_code == 2, result.output
        assert "node.json" in result.output
        assert isinstance(result.exception, SystemExit), "no traceback"


def _gpu(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["gpus"][1].update(fields)


def _cell(matrix: str, value: str, i: int = 0, j: int = 1) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document[matrix][i][j] = value
        if matrix == "links":
            document[matrix][j][i] = value

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_gpu(numa_node=-1), "gpus.1.numa_node"),
        (_gpu(numa_node="0-1"), "gpus.1.numa_node"),
        (_gpu(numa_node="1"), "gpus.1.numa_node"),
        (_gpu(numa_node=True), "gpus.1.numa_node"),
        (_gpu(numa_node=1.0), "gpus.1.numa_node"),
        (_gpu(numa_node=10**400), "gpus.1.numa_node"),
        (_gpu(architecture=-90), "gpus.1.architecture"),
        (_gpu(multiprocessors=1 << 40), "gpus.1.multiprocessors"),
        (_gpu(multicast="yes"), "gpus.1.multicast"),
        (_gpu(index=0), "gpus[1].index=0: is also that of gpus[0]"),
        (_gpu(uuid="GPU-00000000-0000-0000-0000-000000000000"), "gpus[1].uuid="),
        (_gpu(pci_bus_id="00000000:01:00.0"), "gpus[1].pci_bus_id="),
        (lambda document: (_gpu(host=1)(document), _cell("links", "SYS")(document)), "links[0][1]='SYS'"),
        (_cell("links", "NET"), "links[0][1]='NET'"),
        (_cell("links", "NV0"), "links[0][1]='NV0'"),
        (_cell("p2p", "X"), "p2p[0][1]='X'"),
        (_cell("p2p", "OK", 2, 2), "p2p[2][2]='OK'"),
        (lambda document: document.__setitem__("nvswitch", 1), "nvswitch"),
        (lambda document: document.__delitem__("gpus"), "gpus"),
    ],
)
def test_what_makes_no_sense_is_refused(change: Callable[[dict[str, Any]], None], field: str, tmp_path: Path) -> None:
    def prepared(document: dict[str, Any]) -> None:
        document["gpus"][0] |= {"uuid": "GPU-00000000-0000-0000-0000-000000000000", "pci_bus_id": "00000000:01:00.0"}
        change(document)

    path = tmp_path / "node.json"
    path.write_text(json.dumps(broken(prepared)))
    with pytest.raises(TopologyError) as caught:
        NodeTopology.from_json(path)
    assert f"topology file {path}: {field}" in str(caught.value), str(caught.value)


TEXTS = ("source", "driver", "note")
GPU_TEXTS = ("name", "pci_bus_id", "uuid")


@given(st.sampled_from(TEXTS + GPU_TEXTS), st.characters(categories=("Cc", "Cf", "Zl", "Zp", "Co")))
def test_no_control_character_comes_from_a_file(field: str, character: str) -> None:
    """Neither through what is taken, nor through what is said of what is refused."""
    document = json.loads(GOOD)
    holder = document["gpus"][1] if field in GPU_TEXTS else document
    holder[field] = f"GPU{character}[31m"
    document[f"key{character}"] = 1
    path = Path("node.json")
    with pytest.raises(TopologyError) as caught:
        NodeTopology.parse(path, json.dumps(document))
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    assert f"{field}: must be" in str(caught.value)


@pytest.mark.parametrize("command", ("topo", "explain"))
def test_escapes_do_not_reach_the_terminal(command: str, tmp_path: Path) -> None:
    document = broken(_gpu(name=f"NVIDIA {ESCAPE}H200"))
    document[f"{ESCAPE}key"] = 1
    path = tmp_path / "node.json"
    path.write_text(json.dumps(document))
    result = RUNNER.invoke(app, [command, "--topology", str(path)])
    assert result.exit_code == 2
    assert ESCAPE not in result.output
    assert "gpus.1.name" in result.output


def test_what_a_driver_says_is_made_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(FakeNvml):
        def nvmlDeviceGetName(self, _handle: int) -> bytes:
            return b"GPU\x1b[31m \xff\x00" + b"x" * 5000

        def nvmlSystemGetDriverVersion(self) -> str:
            return "580\n.1"

    monkeypatch.setitem(__import__("sys").modules, "pynvml", Odd())
    monkeypatch.setattr(nvml, "_attribute_by_bus_id", lambda _attribute: {})
    topology = NodeTopology.detect()
    assert topology.gpus[0].name.startswith("GPU\\x1b[31m ")
    assert topology.gpus[0].name.isprintable()
    assert len(topology.gpus[0].name) < 1000
    assert topology.driver == "580\\n.1"


@pytest.mark.parametrize(("text", "node"), [("0\n", 0), ("1\n", 1), ("-1\n", None), ("0-1\n", None), ("", None)])
def test_numa_nodes_of_the_kernel(text: str, node: int | None, tmp_path: Path) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "numa_node").write_text(text)
    assert nvml._numa_node("00000000:01:00.0", tmp_path) == node


def test_an_error_is_of_readable_length(tmp_path: Path) -> None:
    """However much is wrong, and however long it is."""
    path = tmp_path / "node.json"
    path.write_text(json.dumps(broken(_cell("links", "W" * 500_000))))
    with pytest.raises(TopologyError) as caught:
        NodeTopology.from_json(path)
    assert len(str(caught.value)) < 2000
    same = {"gpus": [{"index": 0, "name": "GPU"}] * 100}
    same["links"] = same["p2p"] = [["X" if i == j else "?" for j in range(100)] for i in range(100)]
    path.write_text(json.dumps(same))
    with pytest.raises(TopologyError, match=r"gpus\[1\]\.index=0") as caught:
        NodeTopology.from_json(path)
    assert len(str(caught.value).splitlines()) < 10
