"""vLLM over two nodes as docs/several_hosts.md starts it, both on this machine: CPU ranks, of which each is a host."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from llm_allreduce_plugin.demo.engines import ENGINES
from llm_allreduce_plugin.demo.model import NEW_TOKENS, PROMPT, make_model, reference_tokens
from llm_allreduce_plugin.demo.serve import read_reports
from llm_allreduce_plugin.demo.server import end_of, free_port, server, wait_for_health
from tests.support.forked import left_in_shm

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

HOSTS = 2


def test_two_nodes_serve_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO_DEVICE", "cpu")
    model, engine = tmp_path / "model", ENGINES["vllm"]
    make_model(model)
    meeting = free_port()
    url = ""
    logs, pids = [], []
    with contextlib.ExitStack() as nodes:
        for host in reversed(range(HOSTS)):  # the last one started is the one that is asked
            work = tmp_path / f"node{host}"
            work.mkdir()
            port = free_port()
            command, environment = engine.server_setup("TWOSHOT", work, model, port, compiled=False)
            command += ["--nnodes", str(HOSTS), "--node-rank", str(host)]
            command += ["--master-addr", "127.0.0.1", "--master-port", str(meeting)]
            command += ["--headless"] if host else []
            # Different hosts, which NCCL and this package tell apart by that, and gloo and vLLM by nothing.
            environment |= {"NCCL_HOSTID": f"host-{host}", "GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
            log, url = work / "server.log", f"http://127.0.0.1:{port}"
            process = nodes.enter_context(server(command, environment, log))
            logs.append(log)
            pids.append(process.pid)
        expected = reference_tokens(model)
        wait_for_health(process, f"{url}/health", log)
        _, tokens = engine.ask(url, PROMPT, NEW_TOKENS)
        time.sleep(1.5)  # the workers write their reports some times a second
        reports = [read_reports(tmp_path / f"node{host}" / "report") for host in range(HOSTS)]
    said = "\n".join(map(end_of, logs))
    assert tokens == expected, said
    assert [len(found) for found in reports] == [1, 1], "each node has a rank of its own"
    for (report,) in reports:
        assert set(report["calls"]) == {"TWOSHOT"}, report
        assert report["calls"]["TWOSHOT"] > NEW_TOKENS, report
    whole = "".join(log.read_text(errors="replace") for log in logs)
    assert "shm memory inside each of 2 hosts, a network between them" in whole, said
    assert left_in_shm([*pids, os.getpid()]) == []
