"""Real vLLM: a server at tensor parallel 2, and what a user sees when it goes wrong."""

from __future__ import annotations

import copy
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_allreduce_plugin.algorithms.user_buffer import DEFAULT_CPU_POOL_BYTES
from llm_allreduce_plugin.demo import serve as serve_demo
from llm_allreduce_plugin.demo.engines import ENGINES
from llm_allreduce_plugin.demo.server import end_of
from tests.support.forked import left_in_shm, wait_until
from tests.support.marks import slow
from tests.support.switched_off import Watch

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, "-m", "llm_allreduce_plugin", "demo"]
CPU = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
FORK = {"CPU_OPS_FORK": "1"}  # of scripts/vllm_cpu_ops: a server's processes do not each import vLLM
TIMEOUT_S = 5  # of a call, where a worker is stopped


# -- the demo ----------------------------------------------------------------------------------------------------------


def processes_mentioning(text: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (folder / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if int(folder.name) != os.getpid() and (text in command or text in environment):
            found.append(f"{folder.name}: {command[:150]}")
    return found


@pytest.fixture
def marked() -> Iterator[tuple[dict[str, str], str]]:
    """An environment with a mark, by which every process that inherits it can be found."""
    mark = f"DEMO_MARK={os.urandom(8).hex()}"
    environment = {**os.environ, **FORK, "DEMO_DEVICE": "cpu", "DEMO_MARK": mark.split("=")[1]}
    # vLLM gives its processes titles, which are written over what the kernel shows of their environment.
    yield environment | {"VLLM_PROCESS_NAME_PREFIX": mark}, mark
    assert processes_mentioning(mark) == [], "the demo left processes behind"
    assert left_in_shm() == []


def counted(output: str, what: str, calls: int) -> None:
    """At the metrics endpoint, by rank."""
    for rank in (0, 1):
        labels = rf'group="dp0\.ranks0-1\.[^"]+",how="eager",rank="{rank}",strategy="{what}"'
        assert re.search(rf"/metrics: llm_allreduce_calls_total\{{{labels}\}} {calls}\b", output), output


def listens(url: str) -> bool:
    try:
        serve_demo.http(f"{url}/health", timeout=5)
    except urllib.error.HTTPError:
        return True  # unwell, but there
    except OSError:
        return False
    return True


def stop_a_worker(answer: serve_demo.Answer) -> None:
    """A rank that does not answer any more must not hang the engine: the other gives up within timeout_s, vLLM ends."""
    found = re.search(r"Worker_TP1 pid=(\d+)", answer.log.read_text(errors="replace"))
    assert found is not None, end_of(answer.log)
    os.kill(int(found[1]), signal.SIGSTOP)
    # An error, or the end of the connection, and no wait without end.
    with pytest.raises((urllib.error.HTTPError, ConnectionError, http.client.HTTPException)):
        ENGINES["vllm"].ask(answer.url, serve_demo.PROMPT, 4)
    said = answer.log.read_text(errors="replace")
    assert re.search(rf"rank 0 waited {TIMEOUT_S}(\.\d+)? s for rank 1 in TWOSHOT/scatter", said), end_of(answer.log)
    assert wait_until(lambda: not listens(answer.url), 60), f"the server goes on: {end_of(answer.log)}"


# A server each. Reports are what the compiled model's metrics come from, too; groups with NCCL are tested above.
@pytest.mark.parametrize("strategy", (slow("ONESHOT"), "TWOSHOT", "UB", slow("NCCL")))
def test_same_tokens_with_every_strategy_and_an_end_when_a_worker_stops(
    marked: tuple[dict[str, str], str],
    tmp_path: Path,
    strategy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    switches: Watch,
) -> None:
    """The demo's own steps compare with Hugging Face and check what the workers ran; they raise otherwise.

    So all strategies give the same tokens. What ran shows at vLLM's metrics endpoint: read from reports with ONESHOT,
    counted by the ranks in Prometheus' multi-process mode with TWOSHOT, of which a worker is then stopped. With the
    others the server ends in order, and says in its log what ran.
    """
    (tmp_path / "prometheus").mkdir()
    # One of them starts its processes as vLLM's command does by itself.
    own = {
        "TWOSHOT": {
            "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "prometheus"),
            "LLM_ALLREDUCE_TIMEOUT_S": str(TIMEOUT_S),
            "CPU_OPS_FORK": "0",
        }
    }
    for name, value in (marked[0] | CPU | own.get(strategy, {})).items():
        monkeypatch.setenv(name, value)
    engine = ENGINES["vllm"]
    with serve_demo.served(engine, strategy, tmp_path) as answer:
        switches.look()
        assert len(switches.seen) >= 4, "server, engine, two workers; those that lack a switch end the test"
        if strategy == "TWOSHOT":
            stop_a_worker(answer)
    serve_demo.judge(engine, strategy, answer)
    said = capsys.readouterr().out
    assert "Hugging Face generates the same tokens from the same weights" in said
    eager = "all-reduce fusion: layer boundaries are not fused: enforce_eager is on"
    assert said.count(f"the log says: {eager}") == (strategy != "NCCL"), "by rank 0, of groups of ours"
    if strategy != "NCCL":
        assert f"rank 1 reports: {strategy} 216 calls" in said
        counted(said, strategy, 216)
        assert [report["fallbacks"] for report in answer.reports] == [{}, {}]
        pool = {"bytes": DEFAULT_CPU_POOL_BYTES, "stayed": 216, "copied_out": 0} if strategy == "UB" else None
        assert [report["registered_memory"] for report in answer.reports] == [pool, pool]
        if strategy == "ONESHOT":
            assert f"the log says: all-reduce summary: {strategy} 216 calls; no fallbacks" in said
    else:
        assert "vLLM's own all-reduce is left in place" in said
    assert len(answer.tokens) == 24


def test_demo_fuses_every_boundary_of_a_compiled_model(marked: tuple[dict[str, str], str], tmp_path: Path) -> None:
    """Through vLLM's compiler and passes: the demo fails where a boundary is missing, or a token is another one."""
    environment, _ = marked
    tokens = tmp_path / "tokens.json"
    command = [*DEMO, "oneshot", "--compile", "--tokens", str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "the log says: all-reduce fusion: 9 layer boundaries are one call each (9 with RMSNorm)" in result.stdout
    # vLLM splits the model at each attention: one sum before the first, two after each.
    of_graphs = re.findall(r"the log says: all-reduce fusion: (.*) all-reduces of a compiled graph (.*)", result.stdout)
    assert sorted(of_graphs) == [("1 of 1", "are fused (1 with RMSNorm)"), ("2 of 2", "are fused (2 with RMSNorm)")]
    assert "Hugging Face generates the same tokens from the same weights" in result.stdout
    # 24 tokens and the run that compiles, each with 9 sums; norms of fp32 have a kernel of their own.
    for rank in (0, 1):
        assert f"rank {rank} reports: ONESHOT, then norm 225 calls" in result.stdout
    counted(result.stdout, "ONESHOT, then norm", 225)
    fell = "fallbacks: fused norm -> ONESHOT, then norm 225 (only 16-bit types are fused, not float32)"
    assert f"the log says: all-reduce summary: ONESHOT, then norm 225 calls; {fell}" in result.stdout
    assert len(json.loads(tokens.read_text())) == 24


@pytest.mark.slow
def test_bfloat16_with_the_norm_in_the_kernel_of_the_sum(
    marked: tuple[dict[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled model in a 16-bit type: the norm is in one kernel with the sum; tokens are those of vLLM's own norm.

    The demo serves fp32, which takes two kernels.
    """
    for name, value in (marked[0] | CPU).items():
        monkeypatch.setenv(name, value)
    engine, tokens, calls = ENGINES["vllm"], {}, {}
    settings, gpus = engine._template()
    for fuse_norm in (True, False):
        work = tmp_path / f"fuse_norm_{fuse_norm}"
        work.mkdir()
        ours = settings["additional-config"]["allreduce"] | {"fuse_norm": fuse_norm}
        served = settings | {"dtype": "bfloat16", "additional-config": {"allreduce": ours}}
        monkeypatch.setattr(engine, "_template", lambda served=served: (copy.deepcopy(served), gpus))
        with serve_demo.served(engine, "ONESHOT", work, compiled=True) as answer:
            asked = {"model": "demo", "prompt": serve_demo.PROMPT, "max_tokens": 24, "temperature": 0}
            asked |= {"ignore_eos": True, "return_token_ids": True}
            choice = serve_demo.http(f"{answer.url}/v1/completions", asked)["choices"][0]
            time.sleep(1.5)  # the workers write their reports some times a second
            calls[fuse_norm] = [set(report["calls"]) for report in serve_demo.read_reports(work / "report")]
        tokens[fuse_norm] = choice["token_ids"]
        log = answer.log.read_text(errors="replace")
        assert ("9 layer boundaries are one call each" in log) is fuse_norm
        summary = "ONESHOT (fused norm)" if fuse_norm else "ONESHOT"
        assert re.search(rf"all-reduce summary: {re.escape(summary)} \d+ calls; no fallbacks", log), end_of(answer.log)
    assert calls == {True: [{"ONESHOT (fused norm)"}] * 2, False: [{"ONESHOT"}] * 2}
    assert len(tokens[True]) == 24
    assert tokens[True] == tokens[False]


def test_demo_stops_cleanly_on_ctrl_c(marked: tuple[dict[str, str], str]) -> None:
    environment, mark = marked
    process = subprocess.Popen(
        [*DEMO, "ONESHOT"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        # As from a terminal: a shell starts background jobs, this test run perhaps among them, deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (no threads here)
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "vllm serve on port" in line:
            break
    deadline = time.monotonic() + 120
    while len(processes_mentioning(mark)) < 5 and time.monotonic() < deadline:  # demo, server, engine, two workers
        time.sleep(0.2)
    assert len(processes_mentioning(mark)) >= 5
    time.sleep(2)  # into their start
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 130, out
    assert "interrupted" in out


def test_demo_reports_a_server_that_fails(marked: tuple[dict[str, str], str]) -> None:
    """A bad setting stops vLLM at start, with the named error at the end of its log."""
    environment, _ = marked
    result = subprocess.run(
        [*DEMO, "ONESHOT"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**environment, "LLM_ALLREDUCE_TIMEOUT_S": "-1"},
    )
    assert result.returncode == 1, result.stdout
    assert "environment: LLM_ALLREDUCE_TIMEOUT_S='-1': input should be greater than 0" in result.stdout


def test_demo_refuses_an_unknown_strategy() -> None:
    result = subprocess.run([*DEMO, "FASTEST"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "must be one of AUTO, NCCL" in result.stdout
