"""Real SGLang on CPU ranks: servers at tensor parallel 2, and what a user sees when one goes wrong."""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_allreduce_plugin.demo import serve as serve_demo
from tests.support.forked import left_in_shm
from tests.support.marks import slow
from tests.support.packages import name_of
from tests.support.sglang_packages import CPU, PACKAGES
from tests.support.switched_off import Watch

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed"),
]

PROMPTS = (serve_demo.PROMPT, "To be, or not to be", "1 2 3 4 5 6 7 8 9")
# The first norm has no sum of a layer before it, and the sum before the last norm is not left to that.
FUSED, PLAIN = 2 * serve_demo.LAYERS - 1, 2


def command(model: Path, port: int, *words: str) -> list[str]:
    return [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(model),
        "--host", "127.0.0.1", "--port", str(port),
        "--device", "cpu", "--tp-size", "2", "--dtype", "float32", "--attention-backend", "torch_native",
        "--sampling-backend", "pytorch", "--max-total-tokens", "4096", "--sleep-on-idle", *words,
    ]  # fmt: skip


class Server:
    """One that runs: where it is, and what it has said."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self._log = process, port, log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def tokens(self, prompt: str) -> list[int]:
        sampling = {"temperature": 0, "max_new_tokens": serve_demo.NEW_TOKENS, "ignore_eos": True}
        body = {"text": prompt, "sampling_params": sampling}
        return list(serve_demo.http(f"http://127.0.0.1:{self.port}/generate", body)["output_ids"])

    def scheduler(self, rank: int) -> int:
        """The process of a rank."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (
                    os.getpgid(int(folder.name)) == self.process.pid
                    and f"scheduler_TP{rank}" in (folder / "cmdline").read_text()
                ):
                    return int(folder.name)
        message = f"no scheduler of rank {rank}"
        raise AssertionError(message)


@contextlib.contextmanager
def serving(model: Path, folder: Path, *words: str, port: int | None = None, **variables: str) -> Iterator[Server]:
    """A server; nothing of it may be left behind."""
    folder.mkdir(exist_ok=True)
    port, log = port or serve_demo.free_port(), folder / "server.log"
    with serve_demo.server(command(model, port, *words), {**os.environ, **CPU, **variables}, log) as process:
        serve_demo.wait_for_health(process, f"http://127.0.0.1:{port}/health", log)
        yield Server(process, port, log)
    assert not serve_demo.group_is_alive(process.pid)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sglang") / "model"
    serve_demo.make_model(folder)
    return folder


@functools.cache
def expected(model: Path) -> dict[str, list[int]]:
    """What Hugging Face generates from the same weights."""
    return {prompt: serve_demo.reference_tokens(model, prompt) for prompt in PROMPTS}


def check_report(report: dict[str, Any], strategy: str) -> None:
    calls = report["calls"]
    assert set(calls) == {strategy, f"{strategy}, then norm"}, calls
    assert calls[strategy] * FUSED == calls[f"{strategy}, then norm"] * PLAIN, calls
    assert calls[strategy] >= PLAIN * serve_demo.NEW_TOKENS


def same_tokens(server: Server, model: Path) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as at_once:
        answers = dict(zip(PROMPTS, at_once.map(server.tokens, PROMPTS), strict=True))
    assert answers == expected(model)


def started(model: Path, folder: Path, strategy: str, at_once: ThreadPoolExecutor, stack: contextlib.ExitStack) -> Any:
    """The future of a server with this strategy by a flag, and the rest from --config."""
    folder.mkdir()
    rest = {"timeout_s": 6, "first_timeout_s": 60, "report_dir": str(folder / "reports")}
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump({"allreduce-config": rest, "enable-metrics": True}))
    flags = ("--allreduce-strategy", strategy.lower(), "--config", str(config))
    return at_once.submit(stack.enter_context, serving(model, folder, *flags))


# A second one beside the first shows that they keep apart, which groups of their own show without servers.
@pytest.mark.parametrize("strategies", [("ONESHOT",), slow(("ONESHOT", "TWOSHOT"))], ids=" and ".join)
def test_servers(model: Path, tmp_path: Path, strategies: tuple[str, ...], switches: Watch) -> None:
    """Each gives Hugging Face's tokens, counts its calls and fuses every boundary that it should.

    Then a rank of ONESHOT's is stopped and one of TWOSHOT's killed: both servers end, the first with an error
    that names the rank.
    """
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as at_once:
        futures = [started(model, tmp_path / strategy, strategy, at_once, stack) for strategy in strategies]
        expected(model)  # while they start
        servers = dict(zip(strategies, (future.result() for future in futures), strict=True))
        for server in servers.values():
            same_tokens(server, model)
        switches.look()
        assert len(switches.seen) >= 3 * len(servers), "server and two ranks; those that lack a switch end the test"
        time.sleep(1.5)  # ranks write their reports some times a second
        for strategy, server in servers.items():
            found = serve_demo.read_reports(tmp_path / strategy / "reports")
            assert [report["rank"] for report in found] == [0, 1]
            for report in found:
                assert report["group"].startswith("tp0.ranks0-1.")
                check_report(report, strategy)
            assert f"all-reduce fusion: {FUSED} layer boundaries are one call each ({FUSED} with RMSNorm)" in server.log
            assert f"allreduce_strategy {strategy}" in server.log
            assert server.log.count("all-reduce fusion: FlashInfer's is off, whose kernel") == 1
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30) as answer:
                text = answer.read().decode()
            for rank in (0, 1):
                labels = rf'group="tp0\.ranks0-1\.[^"]+",how="eager",rank="{rank}",strategy="{strategy}"'
                counted = re.search(rf"llm_allreduce_calls_total\{{{labels}\}} ([0-9.]+)", text)
                assert counted, text[-2000:]
                assert (
                    float(counted[1])
                    == serve_demo.read_reports(tmp_path / strategy / "reports")[rank]["calls"][strategy]
                )
        if "TWOSHOT" in servers:
            kill_a_rank(servers["TWOSHOT"])
        stop_a_rank(servers["ONESHOT"])
    assert left_in_shm() == []


# What is left alone in vLLM's groups and in SGLang's processes is tested without servers, too.
@pytest.mark.slow
def test_a_stock_server(model: Path, tmp_path: Path) -> None:
    variables = {"LLM_ALLREDUCE_STRATEGY": "NCCL", "LLM_ALLREDUCE_REPORT_DIR": str(tmp_path / "reports-stock")}
    with serving(model, tmp_path / "one", **variables) as server:
        same_tokens(server, model)
        assert "SGLang's own all-reduce is left in place: allreduce_strategy is NCCL" in server.log
        assert [report["calls"] for report in serve_demo.read_reports(tmp_path / "reports-stock")] == [{}, {}]
        assert "layer boundaries are one call each" not in server.log


@pytest.mark.slow
def test_a_server_that_is_started_again_at_once(model: Path, tmp_path: Path) -> None:
    """On the same port and with the same folder of reports: the second one serves as the first, which left nothing."""
    port, folder = serve_demo.free_port(), tmp_path / "reports"
    for turn, word in enumerate(("first", "second")):
        words = ("--allreduce-strategy", "ONESHOT")
        with serving(model, tmp_path / word, *words, port=port, LLM_ALLREDUCE_REPORT_DIR=str(folder)) as server:
            same_tokens(server, model)
            time.sleep(1.5)  # ranks write their reports some times a second
            by_server: dict[str, list[dict[str, Any]]] = {}
            for report in serve_demo.read_reports(folder):
                by_server.setdefault(report["server"], []).append(report)
            assert len(by_server) == turn + 1, "those of the first server stay, and are not the second one's"
            for of_one in by_server.values():
                assert [report["rank"] for report in of_one] == [0, 1]
                for report in of_one:
                    check_report(report, "ONESHOT")
            server.process.terminate()
            assert ended(server), server.log[-3000:]
            ended_at = time.monotonic()
            # By itself: what runs longer than its first process would still be there.
            while serve_demo.group_is_alive(server.process.pid) and time.monotonic() < ended_at + 5:
                time.sleep(0.05)
            assert not serve_demo.group_is_alive(server.process.pid)
            assert left_in_shm() == []
            assert server.log.count("all-reduce summary: ONESHOT ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES[1:], ids=name_of)
@pytest.mark.parametrize("strategy", ["ONESHOT", "TWOSHOT", "NCCL"])
def test_a_server_of_another_version(package: str, strategy: str, model: Path, tmp_path: Path) -> None:
    """The same hooks in a whole server: every all-reduce of the group, and Hugging Face's tokens."""
    if not (Path(package) / "transformers").is_dir():
        pytest.skip(f"{package} is without its transformers: scripts/unpack_engine.sh --whole sglang FOLDER VERSION")
    expected(model)  # by the transformers that are installed
    path = os.pathsep.join(filter(None, [str(Path(package).resolve()), os.environ.get("PYTHONPATH", "")]))
    variables = {"PYTHONPATH": path, "LLM_ALLREDUCE_REPORT_DIR": str(tmp_path / "reports")}
    with serving(model, tmp_path / "server", "--allreduce-strategy", strategy, **variables) as server:
        same_tokens(server, model)
        version = serve_demo.http(f"http://127.0.0.1:{server.port}/get_server_info")["version"]
        assert version == Path(package).name
        time.sleep(1.5)  # ranks write their reports some times a second
        found = serve_demo.read_reports(tmp_path / "reports")
        assert [report["rank"] for report in found] == [0, 1]
        for report in found:
            if strategy == "NCCL":
                assert report["calls"] == {}
            else:
                check_report(report, strategy)
        fused = f"all-reduce fusion: {FUSED} layer boundaries are one call each ({FUSED} with RMSNorm)" in server.log
        assert fused == (strategy != "NCCL")


def log_has(server: Server, pattern: str, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while not re.search(pattern, server.log):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def ended(server: Server) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(60)
    return server.process.poll() is not None


def kill_a_rank(server: Server) -> None:
    """A rank that is gone ends the server, which SGLang itself notices; what ran until then is told."""
    os.kill(server.scheduler(1), signal.SIGKILL)
    assert ended(server), server.log[-3000:]
    assert "all-reduce summary: TWOSHOT " in server.log


def stop_a_rank(server: Server) -> None:
    """A rank that does not answer any more must not hang the server: the other one gives up, and says why.

    It is stopped within a long answer. Where that was while it took requests from the other rank, SGLang waits for it
    there, in a call of its own; then it is let go for another try.
    """
    pid = server.scheduler(1)
    sampling = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            serve_demo.http(f"http://127.0.0.1:{server.port}/generate", {"text": "And", "sampling_params": sampling})

    with ThreadPoolExecutor(1) as asking:
        for _ in range(8):
            answer = asking.submit(ask)
            time.sleep(1)
            os.kill(pid, signal.SIGSTOP)
            if log_has(server, r"rank 0 waited 6(\.\d+)? s for rank 1 in ONESHOT", 12):
                break
            os.kill(pid, signal.SIGCONT)
            answer.result()
        else:
            pytest.fail(f"rank 0 never gave up: {server.log[-3000:]}")
        assert ended(server), server.log[-3000:]
    assert "all-reduce summary: ONESHOT " in server.log, "SGLang kills itself, and our line comes before"


@pytest.mark.parametrize(
    ("words", "variables", "text"),
    [
        (
            ("--allreduce-strategy", "FASTEST"),
            {},
            "argument --allreduce-strategy: 'FASTEST': must be one of AUTO, NCCL",
        ),
        slow(
            (),
            {"LLM_ALLREDUCE_TIMEOUT_S": "-1"},
            "environment: LLM_ALLREDUCE_TIMEOUT_S='-1': input should be greater than 0",
        ),
        (
            ("--json-model-override-args", '{"llm_allreduce": {"timeout": 3}}'),
            {},
            "SGLang json_model_override_args: timeout=3: unknown key",
        ),
    ],
    ids=("flag", "environment", "override args"),
)
def test_bad_settings_end_the_server_at_once(
    model: Path, words: tuple[str, ...], variables: dict[str, str], text: str
) -> None:
    result = subprocess.run(
        command(model, serve_demo.free_port(), *words),
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **CPU, **variables},
    )
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert text in said.splitlines()[-1] or text in said[-1500:], said[-3000:]
    assert "TP0" not in said, "a scheduler was started"
