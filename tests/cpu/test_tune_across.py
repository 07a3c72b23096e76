"""`tune --torchrun` for real: CPU ranks as two hosts, the profile that it writes, and groups that go by it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.profiles import file as profiles
from tests.conftest import PoolFor
from tests.support.hosts import TWO_OF_TWO, communicator

SCRIPT = "NCCL_HOSTID=host-$((2 * RANK / WORLD_SIZE)) exec {python} {program} tune --torchrun {flags}"


def tune(flags: str, program: str = "-m llm_allreduce_plugin", ranks: int = 4) -> subprocess.CompletedProcess[str]:
    """By ranks on two hosts."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--no-python",
        "bash", "-c", SCRIPT.format(python=sys.executable, program=program, flags=flags),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLM_ALLREDUCE_")}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment | {"GLOO_SOCKET_IFNAME": "lo"}
    )


def _source(context: RankContext, hosts: Sequence[int], path: str) -> tuple[str, int | None]:
    """Why one of two kernels runs, and whether sums are right."""
    with communicator(context, hosts, "AUTO", timeout_s=30, tuning_profile=path) as group:
        output = group.all_reduce(torch.full((100,), float(context.rank)))
        assert (output == sum(range(context.world_size))).all()
        tuned = group.facts.tuned
        return group.explain((100,), torch.bfloat16).reason, None if tuned is None else len(tuned.ranges)


# What still runs beside the main thread when the interpreter ends, Python's threads and others. One that then takes the
# interpreter's lock inside of torch ends the process by SIGABRT, as gloo's do, and those that ask a store.
AT_THE_END = """
import atexit, os, pathlib, sys, threading
def tell():
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    gloos = [name for name in names if "gloo" in name]
    line = "at the end: %d of Python, gloo's: %s\\n" % (len(threading.enumerate()), gloos)
    os.write(2, line.encode())  # at once: ranks write to the same pipe
atexit.register(tell)
"""
ALONE = "at the end: 1 of Python, gloo's: []\n"
RIGHT = f"""{AT_THE_END}
from llm_allreduce_plugin.cli import app
app(sys.argv[1:])
"""


def test_two_hosts_are_measured_as_one_group(cpu_pool: PoolFor, tmp_path: Path) -> None:
    program, path = tmp_path / "right.py", tmp_path / "pair.json"
    program.write_text(RIGHT)
    result = tune(f"--quick -b 1K -e 64K --output {path}", str(program))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr.count(ALONE) == 4, result.stderr
    assert result.stdout.count("# llm-allreduce tune: ") == 1, "the first rank speaks for all"
    assert "4 ranks on 2 hosts, shm memory, 16-bit elements" in result.stdout
    (made,) = profiles.read(path).entries
    assert (made.world_size, made.hosts, made.in_band, made.fused) == (4, 2, False, None)
    assert {1024, 4096, 16384, 65536} <= {row.bytes for row in made.measured}
    assert all(time > 0 for row in made.measured for time in row.eager_us.values())
    for reason, ranges in cpu_pool(4).run(_source, TWO_OF_TWO, str(path)):
        assert f"(profile {path}, measured {made.date[:10]}" in reason
        assert ranges == 1
    for reason, ranges in cpu_pool(4).run(_source, (0, 0, 0, 0), str(path)):
        assert ranges is None, "on one host the same ranks are another group"
        assert "seed table for 4 ranks" in reason


WRONG = f"""{AT_THE_END}
from unittest import mock
from llm_allreduce_plugin.bench import messages
from llm_allreduce_plugin.cli import app
with mock.patch.object(messages, "wrong_elements", lambda *_: 3):
    app(sys.argv[1:])
"""


def test_a_wrong_answer_ends_all_ranks_and_writes_nothing(tmp_path: Path) -> None:
    program, path = tmp_path / "wrong.py", tmp_path / "pair.json"
    program.write_text(WRONG)
    result = tune(f"--quick -b 1K -e 4K --output {path}", str(program), ranks=2)
    assert result.returncode != 0
    assert "gave 3 wrong elements of 1024 bytes (2 ranks, bfloat16): no entry is written for them" in result.stderr
    assert result.stderr.count(ALONE) == 2, result.stderr
    assert not path.exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--torchrun"], "--torchrun: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        (["--torchrun", "--tp", "4"], "--tp 4: with --torchrun all ranks are one group; leave it out"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(app, ["tune", *flags], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.replace("│", " ").split())
