"""`check --torchrun` for real: CPU ranks that torchrun starts, as two hosts of two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.marks import slow

SCRIPT = "NCCL_HOSTID=host-{hosts} exec {python} -m llm_allreduce_plugin check --torchrun --json"


def check(ranks: int, hosts: str) -> tuple[int, dict[str, Any]]:
    """Exit code and document. ``hosts``: in the shell's words, of a rank's number."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--no-python",
        "bash", "-c", SCRIPT.format(hosts=hosts, python=sys.executable),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLM_ALLREDUCE_")}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=150, env=environment | {"GLOO_SOCKET_IFNAME": "lo"}
    )
    assert result.stdout.startswith("{"), result.stdout + result.stderr
    found: dict[str, Any] = json.loads(result.stdout)  # of the first rank alone
    return result.returncode, found


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        slow("one", [("hosts", "OK", "4 ranks on 1 host (4)"), ("sums", "OK", "4 ranks summed to the bit")]),
        (
            "$((RANK / 2))",
            [
                ("hosts", "OK", "4 ranks on 2 hosts (2, 2)"),
                ("NVLink domain", "WARN", "CPU ranks have no NVLink"),
                ("sums", "OK", "4 ranks summed to the bit"),
            ],
        ),
        # As tests/unit/test_across.py and tests/cpu/test_hosts.py say without torchrun.
        slow(
            "$((RANK / 3))",
            [
                ("hosts", "WARN", "4 ranks on 2 hosts (3, 1)"),
                ("NVLink domain", "WARN", "CPU ranks have no NVLink"),
                ("sums", "WARN", "right, by the engine's own all-reduce: ranks run on 2 hosts"),
            ],
        ),
    ],
    ids=("one host", "two hosts", "unequal hosts"),
)
def test_ranks_say_what_joins_them(hosts: str, expected: list[tuple[str, str, str]]) -> None:
    code, document = check(4, hosts)
    assert code == 0, document
    assert document["works"]
    found = [(finding["name"], finding["verdict"], finding["text"]) for finding in document["findings"]]
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    for (*_, text), (*_, beginning) in zip(found, expected, strict=True):
        assert text.startswith(beginning), found
