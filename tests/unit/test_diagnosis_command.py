"""llm-allreduce check: what its proofs mean and how they end, what it prints, and what the shell completes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_allreduce_plugin import AllReduceConfig, NodeTopology, diagnosis
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.config import TransportChoice
from llm_allreduce_plugin.diagnosis import Finding, Verdict, proof
from llm_allreduce_plugin.diagnosis.finding import guarded, ok
from llm_allreduce_plugin.diagnosis.proof import Proof, Task
from tests.support.forked import wait_until
from tests.unit.test_diagnosis import FAIL, OK, WARN
from tests.unit.test_diagnosis_hardware import FOLDER, load

RUNNER = CliRunner()

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


def test_the_same_ranks_prove_one_thing_after_another(tmp_path: Path) -> None:
    """Until something is not proved: then others do."""
    script = f"""
for line in sys.stdin:
    task = json.loads(line)
    with open({str(tmp_path / "asked")!r}, "a") as file:
        print(__import__("os").getpid(), task["transport"], file=file)
    print(json.dumps({{"step": "summing"}}), json.dumps({{"answer": "lost" if task["workspace_bytes"] else None}}),
          sep="\\n", flush=True)
"""
    peer, host = (Task("cpu", 2, transport) for transport in (TransportChoice.PEER, TransportChoice.HOST))
    broken = Task("cpu", 2, TransportChoice.PEER, workspace_bytes=1)
    with proof.Prover(command=fake(script)) as prover:
        outcomes = [prover(task).outcome for task in (peer, host, broken, host, Task("cpu", 3, TransportChoice.HOST))]
    assert outcomes == ["proved", "proved", "failed", "proved", "proved"]
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert [transport for _, transport in asked] == ["peer", "host", "peer", "host", "host"]
    children = [pid for pid, _ in asked]
    assert children[0] == children[1] == children[2]
    assert len(set(children)) == 3, "others after a failure, and for another number of ranks"
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_torch_is_loaded_before_it_is_known_what_to_prove(tmp_path: Path) -> None:
    """By the process that then proves it, whatever that is."""
    script = f"""
open({str(tmp_path / "began")!r}, "a").write(f"{{__import__('os').getpid()}} ")
for line in sys.stdin:
    print(json.dumps({{"answer": None}}), flush=True)
"""
    with proof.Prover(command=fake(script)) as prover:
        prover.begin()
        wait_until((tmp_path / "began").exists)
        outcomes = [prover(Task("cpu", ranks, TransportChoice.AUTO)).outcome for ranks in (2, 2, 3)]
    assert outcomes == ["proved"] * 3
    assert len((tmp_path / "began").read_text().split()) == 2, "the second for three ranks"


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_probe_that_breaks_is_a_finding() -> None:
    def broken() -> Finding:
        message = "no such file"
        raise OSError(message)

    (found,) = guarded("anything", broken)
    assert found.verdict is WARN
    assert found.text == "could not be checked: OSError: no such file"
    assert guarded("anything", lambda: ok("a", "b")) == [ok("a", "b")]


def test_exit_codes_and_json(monkeypatch: pytest.MonkeyPatch, begun: type[_Begun]) -> None:
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
    assert begun.times == 0, "without proofs nothing is started"


class _Begun(proof.Prover):
    """Starts nothing, and counts how often it should have."""

    times = 0

    def begin(self) -> None:
        type(self).times += 1


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> type[_Begun]:
    monkeypatch.setattr(_Begun, "times", 0)
    monkeypatch.setattr(importlib.import_module("llm_allreduce_plugin.cli.check"), "Prover", _Begun)
    return _Begun


def test_proofs_are_printed_with_the_rest(monkeypatch: pytest.MonkeyPatch, begun: type[_Begun]) -> None:
    bad = Finding("peer access", FAIL, "bytes were lost", "look at the BIOS")

    def look() -> tuple[list[Finding], NodeTopology]:
        assert begun.times == 1, "whatever loads torch does so meanwhile"
        return [ok("GPUs", "2 x test")], NodeTopology()

    monkeypatch.setattr(diagnosis, "look", look)
    monkeypatch.setattr(diagnosis, "prove", lambda *_: [bad])
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
