"""SGLang's own layers and groups of two with this plugin: of the version that is installed, and of others unpacked."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_allreduce_plugin.demo import serve as serve_demo
from tests.support.marks import slow
from tests.support.packages import INSTALLED
from tests.support.sglang_packages import CPU, PACKAGES, run_module

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed"),
]


@functools.cache
def faults_of(package: str) -> dict[str, Any]:
    """The faults of every case of ``tests.support.sglang_cases``, in one process of that version."""
    result = run_module(package, "tests.support.sglang_cases")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("what", ["arguments", "question", "group", "norm, ", "model, "])
def test_hooks_in_sglangs_own_layers(package: str, what: str) -> None:
    found = faults_of(package)
    of_these = {name: fault for name, fault in found["faults"].items() if name.startswith(what)}
    by_itself = tuple(map(int, found["version"].split(".")[:3])) >= (0, 5, 22)
    assert of_these or (what == "model, " and by_itself), "from 0.5.22 on models have boundaries: servers show them"
    assert [f"{name}: {fault}" for name, fault in of_these.items() if fault is not None] == []


@pytest.mark.parametrize(
    ("package", "strategy"),
    [
        (INSTALLED, "TWOSHOT"),
        (INSTALLED, "UB"),
        *(slow(package, "TWOSHOT") for package in PACKAGES if package != INSTALLED),
    ],
)
def test_groups_of_two_processes(package: str, strategy: str, tmp_path: Path) -> None:
    """Tensor-parallel groups have a communicator each, which ends with them; other groups are left alone.

    Calls of both overlap, and none maps memory after the first ones.
    """
    variables = {"LLM_ALLREDUCE_STRATEGY": strategy, "LLM_ALLREDUCE_REPORT_DIR": str(tmp_path / "reports")}
    result = run_module(package, "tests.support.sglang_groups", str(tmp_path / "store"), **variables)
    seen = sorted(
        (json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")), key=lambda of: of["rank"]
    )
    calls = {"tp": {strategy: 11, "NCCL": 1}, "pdmux_prefill_tp": {strategy: 11}, "attention_tp": None, "pp": None}
    assert seen == [{"rank": rank, "groups": calls} for rank in (0, 1)]
    names = {report["group"].split(".")[0] for report in serve_demo.read_reports(tmp_path / "reports")}
    assert names == {"tp0", "pdmux-prefill-tp0"}
    assert (
        "group attention_tp:0 is a part of the tensor-parallel group and keeps SGLang's own all-reduce" in result.stderr
    )


@pytest.mark.parametrize(("named", "hooked"), [("another", False), slow("another,llm_allreduce", True)])
def test_plugin_not_named_leaves_sglang_alone(named: str, hooked: bool) -> None:
    script = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.server_args import ServerArgs
found = (GroupCoordinator.__init__, GroupCoordinator.all_reduce, ServerArgs.add_cli_args)
print([hasattr(function, "__wrapped__") for function in found])
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **CPU, "SGLANG_PLUGINS": named},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == str([hooked] * 3)
