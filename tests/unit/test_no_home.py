"""A user without a home directory, as containers with a random uid have: a cache is a convenience, no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.errors import CacheError
from llm_allreduce_plugin.profiles import search
from llm_allreduce_plugin.topology import NodeIdentity
from tests.unit.test_profile import H200
from tests.unit.test_profile_search import FACTS

UID = 54_321  # nobody's
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root may become another user, with setpriv"
)


def as_nobody(*command: str, cwd: str = "/", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user that /etc/passwd does not know, without ``HOME``."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    # It keeps the right to read the interpreter, wherever that is installed.
    become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    return subprocess.run(
        [*become, sys.executable, *command],
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1", **variables},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
    )


def command(*words: str, **variables: str) -> tuple[int, str]:
    result = as_nobody("-m", "llm_allreduce_plugin", *words, **variables)
    said = result.stdout + result.stderr
    assert "Traceback" not in said, said
    return result.returncode, said


START = r"""
import logging, sys, tempfile
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import torch
import torch.distributed as dist
from llm_allreduce_plugin import AllReduceConfig, TensorParallelCommunicator

def main(rank, store):
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{store}")
    group = TensorParallelCommunicator(dist.group.WORLD, torch.device("cpu"), AllReduceConfig())
    assert torch.equal(group.all_reduce(torch.ones(8)), torch.full((8,), 2.0))
    sys.stdout.write(f"ran {group.report()['calls']}\n")
    sys.stdout.flush()
    group.close()
    dist.destroy_process_group()

if __name__ == "__main__":
    import torch.multiprocessing
    torch.multiprocessing.start_processes(main, (sys.argv[1],), 2, start_method="fork")
"""


@needs_root
@pytest.mark.timeout(120)
def test_auto_starts_and_says_which_cache_it_does_without(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Path("/tmp") / f"llm-allreduce-no-home-{os.getpid()}"
    folder.mkdir(mode=0o777)
    try:
        folder.chmod(0o777)
        script = folder / "start.py"
        script.write_text(START)
        result = as_nobody(str(script), str(folder / "store"), cwd=str(folder))
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count("ran {'ONESHOT': 1}") == 2
        said = [line for line in result.stdout.splitlines() if line.startswith("no cache of tuning profiles: ")]
        assert len(said) == 1, result.stdout
        assert "XDG_CACHE_HOME" in said[0]
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@needs_root
def test_commands_say_it_in_a_line_and_go_on() -> None:
    code, said = command("explain", "--cpu")
    assert code == 0
    assert "# no cache of tuning profiles: " in said
    assert "because" in said
    code, said = command("check", "--no-proof")
    assert code == 0
    assert "could not be checked" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("WARN  tuning profile")]
    assert "the seed table" in line
    assert "no cache of tuning profiles" in " ".join(said.split())
    assert "tune --force" not in said


@needs_root
def test_tune_says_before_it_measures_where_else_to_write(tmp_path: Path) -> None:
    code, said = command("tune", "--cpu", "--quick", "--tp", "2")
    assert code == 2
    assert "no cache of tuning profiles: " in said
    assert "--output" in said
    assert "us per call" not in said


@pytest.mark.parametrize("home", (None, "", "relative/home"))
def test_where_there_is_no_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    """Whatever platformdirs makes of it, no folder named ``~`` and none that depends on where one stands."""

    def nobody(_uid: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    with pytest.raises(CacheError, match="no cache of tuning profiles: .*; set XDG_CACHE_HOME to a folder"):
        search.cache_path(NodeIdentity.of_cpu())
    found = search.find(None, FACTS, H200)
    assert any(line.startswith("no cache of tuning profiles: ") for line in found.ignored)
    assert search.find("none", FACTS, H200).ignored == ()


def test_a_cache_that_cannot_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.symlink_to(cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    result = CliRunner().invoke(app, ["explain", "--cpu"])
    assert result.exit_code == 0, result.output
    assert f"# tuning profile {cache}/llm_allreduce_plugin/tuning/" in result.output
    assert "it cannot be read: Too many levels of symbolic links: ignored" in result.output


@pytest.mark.parametrize("what", ("a pipe", "a folder", "UTF-16", "huge", "deep", "/dev/zero"))
@pytest.mark.timeout(30)
def test_whatever_lies_in_the_cache_is_ignored_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Nothing hangs, nothing is read without end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = search.cache_path(NodeIdentity.of_cpu())
    path.parent.mkdir(parents=True)
    match what:
        case "a pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
        case "UTF-16":
            path.write_text("{}", encoding="utf-16")
        case "huge":
            path.write_bytes(b" " * (64 << 20))
        case "deep":
            path.write_text("[" * 100_000)
        case _:
            path.symlink_to(what)
    result = CliRunner().invoke(app, ["explain", "--cpu"])
    assert result.exit_code == 0, result.output
    assert f"# tuning profile {path}: it is " in result.output
    assert ": ignored" in result.output
