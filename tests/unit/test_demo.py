"""llm-allreduce demo: which strategy and engine its words name, and what the servers are started with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from llm_allreduce_plugin.demo import serve as serve_demo
from llm_allreduce_plugin.demo import server as demo_server
from llm_allreduce_plugin.demo.engines import ENGINES, SETTINGS
from llm_allreduce_plugin.demo.server import DemoError
from tests.support.forked import wait_until


@pytest.mark.parametrize(
    ("words", "strategy", "engine"),
    [
        ([], "ONESHOT", "vllm"),
        (["sglang"], "ONESHOT", "sglang"),
        (["twoshot"], "TWOSHOT", "vllm"),
        (["TWOSHOT", "SGLang"], "TWOSHOT", "sglang"),
        (["vllm", "nccl"], "NCCL", "vllm"),
    ],
)
def test_words_come_in_either_order(words: list[str], strategy: str, engine: str) -> None:
    assert serve_demo.choices(words) == (strategy, ENGINES[engine])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["FAST", "sglang"], "'FAST': must be one of AUTO, NCCL.*or an engine: vllm or sglang"),
        (["ONESHOT", "TWOSHOT"], "ONESHOT and TWOSHOT: give one strategy and one engine"),
        (["vllm", "sglang"], "vllm and sglang: give one strategy"),
    ],
)
def test_other_words_are_refused(words: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        serve_demo.choices(words)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_strategy_is_written_into_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, device: str
) -> None:
    monkeypatch.setattr("llm_allreduce_plugin.demo.engines.two_gpus", lambda: device == "gpu")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # which the tests set for themselves
    command, environment = serve_demo.server_setup("TWOSHOT", tmp_path, tmp_path / "model", 1234, engine=engine)
    settings = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())
    example = yaml.safe_load((SETTINGS / f"{engine}_{device}.yaml").read_text())
    ours = {"allreduce_strategy": "TWOSHOT", "report_dir": str(tmp_path / "report")}
    if engine == "vllm":
        assert settings.pop("additional-config")["allreduce"] == ours
        example.pop("additional-config")
    else:
        assert settings.pop("allreduce-strategy") == ours.pop("allreduce_strategy")
        assert settings.pop("allreduce-config") == ours
        example.pop("allreduce-strategy")
    assert settings == example
    assert command[command.index("--port") + 1] == "1234"
    assert (environment.get("OMP_NUM_THREADS") == "1") is (device == "cpu")
    if engine == "sglang":
        assert (environment.get("SGLANG_USE_CPU_ENGINE") == "1") is (device == "cpu")


def test_sglangs_cpu_engine_compiles_nothing(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="--compile is for vLLM"):
        serve_demo.server_setup("ONESHOT", tmp_path, tmp_path / "model", 1, compiled=True, engine="sglang")


def test_fewer_fused_boundaries_fail(capsys: pytest.CaptureFixture[str]) -> None:
    line = "INFO all-reduce fusion: 7 layer boundaries are one call each (7 with RMSNorm); one kernel or two"
    serve_demo.check_fusion(7, f"{line}\n{line}")
    assert capsys.readouterr().out == f"[demo] the log says: {line[5:]}\n", "once"
    serve_demo.check_fusion(None, "")
    for log in ("", line.replace("7 layer", "17 layer")):
        with pytest.raises(DemoError, match="not all of the 7 layer boundaries are one call"):
            serve_demo.check_fusion(7, log)


def test_an_engine_that_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert serve_demo.demo(["sglang"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("[demo] FAILED: sglang is not installed in this Python environment (")
    assert said.rstrip().endswith("pip install sglang")


SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (time.sleep(1.5), sys.exit(0)))
print("ready", flush=True)
time.sleep(60)
"""


def _interrupted_twice(log: Path) -> None:
    with serve_demo.server([sys.executable, "-c", SLEEPER], dict(os.environ), log):
        try:
            wait_until(lambda: "ready" in log.read_text())
            raise KeyboardInterrupt
        finally:
            again = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
            again.start()


def test_a_second_ctrl_c_does_not_leave_the_server_behind(tmp_path: Path) -> None:
    """The first one ends the demo, the second comes while its server winds down."""
    stopped: list[subprocess.Popen[bytes]] = []
    stop = demo_server.stop
    with mock.patch.object(demo_server, "stop", lambda process: (stop(process), stopped.append(process))):
        with pytest.raises(KeyboardInterrupt):
            _interrupted_twice(tmp_path / "log")
        time.sleep(0.6)  # the second has come
    (process,) = stopped
    assert process.returncode == 0, "it ended in order, not by a stronger signal"
    assert not serve_demo.group_is_alive(process.pid)
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


DYING = """
import socket, sys, time
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    print("ready", flush=True)
    for answer in {answers!r}:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(answer)
        print("its last words", flush=True)
        connection.close()
"""


@pytest.mark.parametrize(
    "answers",
    [
        [b""],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf"],
        [b"no HTTP"],
        [b"HTTP/1.0 200 OK\r\n\r\n", b""],
    ],
    ids=("nothing", "half", "no HTTP", "no metrics"),
)
def test_a_server_that_dies_while_it_answers_leaves_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[bytes]
) -> None:

    class Dying(type(ENGINES["vllm"])):  # type: ignore[misc]
        def server_setup(self, *arguments: Any, **_: Any) -> tuple[list[str], dict[str, str]]:
            return [sys.executable, "-c", DYING.format(answers=answers), str(arguments[3])], dict(os.environ)

        def ask(self, url: str, *_: Any) -> tuple[str, list[int]]:
            serve_demo.http(url)
            return "", []

    monkeypatch.setattr(serve_demo, "make_model", lambda _: None)
    monkeypatch.setattr(serve_demo, "reference_tokens", lambda _: [])
    monkeypatch.setattr(serve_demo, "wait_for_health", lambda *_: wait_until(lambda: "ready" in log.read_text()))
    log = tmp_path / "server.log"
    with (
        pytest.raises(DemoError, match=r"(?s)did not answer: .*the end of its log:\n.*its last words"),
        serve_demo.served(Dying(), "ONESHOT", tmp_path),
    ):
        pass


def test_a_start_says_what_it_waits_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_server, "PROGRESS_S", 0.2)
    monkeypatch.setattr(demo_server, "STARTUP_LIMIT_S", 3.0)
    log = tmp_path / "log"
    url = f"http://127.0.0.1:{serve_demo.free_port()}/health"
    with (
        serve_demo.server([sys.executable, "-c", SLEEPER], dict(os.environ), log) as process,
        pytest.raises(DemoError, match="was not healthy within 3.0 s"),
    ):
        serve_demo.wait_for_health(process, url, log)
    assert "s; its log: ready\n" in capsys.readouterr().out


TAKEN = """
import time
print("ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', {port}): address already in use")
print("INFO:     Waiting for application shutdown.", flush=True)
time.sleep(60)
"""


def test_a_server_whose_port_is_taken_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's does not end by itself then."""
    monkeypatch.setattr(demo_server, "STARTUP_LIMIT_S", 20.0)
    port = serve_demo.free_port()
    command = [sys.executable, "-c", TAKEN.format(port=port)]
    with (
        serve_demo.server(command, dict(os.environ), tmp_path / "log") as process,
        pytest.raises(DemoError, match=rf"(?s)port {port} was taken by another process.*try again.*Errno 98"),
    ):
        serve_demo.wait_for_health(process, f"http://127.0.0.1:{port}/health", tmp_path / "log")


def test_ports_are_none_that_the_kernel_gives_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server's own processes ask for some of these while it starts."""
    given_out = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(demo_server, "GIVEN_OUT", given_out)
    for text, below in (("32768\t60999\n", 32768), ("20010 60999", 20010), ("nothing of use", 32768)):
        given_out.write_text(text)
        assert all(demo_server.FIRST_PORT <= serve_demo.free_port() < below for _ in range(20))
    given_out.write_text("1024 65535")  # there is none
    with socket.create_server(("127.0.0.1", serve_demo.free_port())):
        pass
