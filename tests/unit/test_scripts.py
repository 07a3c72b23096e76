"""scripts/: how often the README's commands compile the kernels. Calls of pip are counted instead of made."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("pyproject.toml", "csrc", "scripts", ".gitignore", ".ci", "configs")
LEFTOVERS = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
# Stands for .venv/bin/python: writes down what it is asked, and leaves behind what pip leaves. Short programs do run.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
for word in "$@"; do
  if [[ $word == ./scripts/*_cpu_ops ]]; then
    name=${word##*/}
    mkdir -p "$word/build/lib" "$word/$name.egg-info"
    cp "$word/$name.py" "$word/build/lib"
    date +%N >"$word/$name.egg-info/SOURCES.txt"
    mkdir -p scripts/__pycache__ && date +%N >scripts/__pycache__/build_backend.cpython-311.pyc
  fi
done
# What a build needs is a package, too: of it, the hooks that build_backend.py wraps.
if [[ "$*" =~ --target\\ ([^ ]+)\\ scikit-build-core ]]; then
  package=${BASH_REMATCH[1]}/scikit_build_core
  mkdir -p "$package" && touch "$package/__init__.py"
  echo 'get_requires_for_build_wheel = lambda settings: ["from-the-backend"]' >"$package/build.py"
fi
if [[ $1 == -c ]]; then exec {python} "$@"; fi
"""


class Checkout:
    """What the scripts need of this repository, and an environment that was made, on a machine without GPUs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        folder.mkdir()
        self.calls_file.touch()
        for name in PARTS:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=LEFTOVERS)
            elif source.exists():
                shutil.copy2(source, folder / name)
        self.program(folder / ".venv" / "bin" / "python", STAND_IN.replace("{python}", sys.executable))
        self.program(folder / ".venv" / "bin" / "clang-format", "#!/bin/sh\n")
        self.program(folder / "bin" / "nvidia-smi", "#!/bin/sh\nexit 1\n")
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, *command: str) -> list[str]:
        """The calls of Python that a command makes."""
        before = len(self.calls_file.read_text().splitlines())
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("LLM_ALLREDUCE_", "DEMO_"))
        }
        environment |= {"CALLS": str(self.calls_file), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        subprocess.run(command, cwd=self.folder, env=environment, check=True, capture_output=True)
        return self.calls_file.read_text().splitlines()[before:]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


def compiles(calls: list[str]) -> list[str]:
    """Calls that build this package, whose build is the compile; but for the wheel that is made to be checked."""
    installs = [call for call in calls if " install " in call and "--wheel-dir" not in call]
    return [
        call
        for call in installs
        if any(word == "." or word.startswith(".[") for word in call.split()) or "-e" in call.split()
    ]


def test_the_test_script_compiles_once_and_the_demo_not_again(checkout: Checkout) -> None:
    first = checkout.run("scripts/test.sh")
    assert len(compiles(first)) == 1, compiles(first)
    assert any(call.startswith("-m pytest") for call in first), "it went on to the tests"
    for tool in ("ruff", "mypy", "pytest", "hypothesis", "matplotlib", "clang-format"):
        assert any(" install " in call and tool in call for call in first), f"{tool} is installed"
    assert (checkout.folder / "scripts" / "vllm_cpu_ops" / "build").exists(), "leftovers that a build leaves"
    needs = [call for call in first if "--target .venv/build-needs" in call]
    assert len(needs) == 2 and "nanobind" in needs[0], needs
    assert "from-the-backend" in needs[1] and "nvidia-cuda-nvcc" in needs[1], "with no toolkit, from PyPI"
    (install,) = compiles(first)
    (wheel,) = [call for call in first if " wheel " in call]
    assert any(" install filelock" in call and "pydantic" in call for call in first), "what it needs to run"
    assert "--no-build-isolation" in install and "--no-build-isolation" in wheel, "one build folder for both"
    assert [call for call in checkout.run("scripts/serve_demo.sh") if " pip " in call] == []
    assert [call for call in checkout.run("scripts/test.sh", "tests/unit") if " pip " in call] == []


def test_the_demo_compiles_once_and_the_tests_not_again(checkout: Checkout) -> None:
    assert len(compiles(checkout.run("scripts/serve_demo.sh"))) == 1
    assert compiles(checkout.run("scripts/serve_demo.sh")) == []
    assert compiles(checkout.run("scripts/test.sh", "tests/unit")) == []


@pytest.mark.parametrize(
    ("changed", "compiled"),
    [
        ("csrc/host/layout.h", True),
        ("csrc/kernels/new.cu", True),
        ("scripts/build_backend.py", True),
        ("pyproject.toml", True),
        ("scripts/vllm_cpu_ops/vllm_cpu_ops.py", False),
        ("scripts/vllm_cpu_ops/build/lib/vllm_cpu_ops.py", False),
        ("csrc/__pycache__/x.pyc", False),
    ],
)
def test_what_is_compiled_anew(checkout: Checkout, changed: str, compiled: bool) -> None:
    checkout.run("scripts/serve_demo.sh")
    path = checkout.folder / changed
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n")
    calls = checkout.run("scripts/serve_demo.sh")
    assert bool(compiles(calls)) is compiled, calls
    if changed == "scripts/vllm_cpu_ops/vllm_cpu_ops.py":
        assert any("./scripts/vllm_cpu_ops" in call for call in calls)


def test_each_engine_is_installed_for_who_asks_for_it(checkout: Checkout) -> None:
    def named(calls: list[str]) -> list[str]:
        return [engine for engine in ("torch==2.13.0", "vllm==", "sglang==") if any(engine in call for call in calls)]

    first = checkout.run("scripts/serve_demo.sh", "sglang", "TWOSHOT")
    assert named(first) == ["torch==2.13.0", "sglang=="]
    assert any(call.endswith("./scripts/sglang_cpu_ops") for call in first)
    assert first[-1] == "-m llm_allreduce_plugin demo sglang TWOSHOT"
    second = checkout.run("scripts/serve_demo.sh", "TWOSHOT")
    assert named(second) == ["torch==2.13.0", "vllm=="]
    assert compiles(second) == [], "one compile for both"
    assert [call for call in checkout.run("scripts/serve_demo.sh", "TWOSHOT", "SGLang") if " install " in call] == []


def test_on_gpus_sglang_has_an_environment_of_its_own(checkout: Checkout) -> None:
    gpu = '#!/bin/sh\nif [ "$1" = -L ]; then echo "GPU 0: NVIDIA H200"; else echo 9.0; fi\n'
    Checkout.program(checkout.folder / "bin" / "nvidia-smi", gpu)
    own = STAND_IN.replace("{python}", sys.executable).replace("'%s\\n'", "'sglang: %s\\n'", 1)
    Checkout.program(checkout.folder / ".venv-sglang" / "bin" / "python", own)
    calls = checkout.run("scripts/serve_demo.sh", "sglang")
    assert calls, "the demo ran"
    assert all(call.startswith("sglang: ") for call in calls), calls
    assert any("torch==2.14.1" in call for call in calls)
    assert any("sglang==" in call and "--no-deps" not in call for call in calls), "with all that it needs"
    others = checkout.run("scripts/serve_demo.sh")
    assert not any(call.startswith("sglang: ") or "sglang" in call for call in others), others
    assert any("torch==2.13.0" in call for call in others)


def test_pip_speaks_when_it_fails(checkout: Checkout) -> None:
    noise = '[[ "$*" == *"-m pip"* ]] && echo noise of pip'
    noisy = STAND_IN.replace("{python}", sys.executable).replace("for word", f"{noise}\nfor word", 1)
    Checkout.program(checkout.folder / ".venv" / "bin" / "python", noisy.replace("for word", "CODE\nfor word", 1))
    python = checkout.folder / ".venv" / "bin" / "python"
    text = python.read_text()
    for code, heard in (('[[ "$*" == *--editable* ]] && exit 1', True), ("true", False)):
        Checkout.program(python, text.replace("CODE", code))
        environment = {**os.environ, "CALLS": str(checkout.calls_file)}
        environment["PATH"] = f"{checkout.folder / 'bin'}:{os.environ['PATH']}"
        command = "source scripts/environment.sh && set -e && make_environment .venv vllm"
        result = subprocess.run(
            ["bash", "-c", command], cwd=checkout.folder, env=environment, capture_output=True, text=True
        )
        assert (result.returncode != 0) is heard
        assert ("noise of pip" in result.stdout + result.stderr) is heard
        assert "building and installing llm_allreduce_plugin" in result.stdout


def test_a_failed_step_is_done_again(checkout: Checkout) -> None:
    python = checkout.folder / ".venv" / "bin" / "python"
    text = python.read_text()
    Checkout.program(python, text.replace("for word", '[[ "$*" == *--editable* ]] && exit 1\nfor word', 1))
    with pytest.raises(subprocess.CalledProcessError):
        checkout.run("scripts/serve_demo.sh")
    Checkout.program(python, text)
    assert len(compiles(checkout.run("scripts/serve_demo.sh"))) == 1


def test_a_release_is_checked_on_all_that_it_is_built_for() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["cmake"]["define"]
    every = settings["LLM_ALLREDUCE_CUDA_ARCHS"]["default"]
    script = (ROOT / "scripts" / "check_release.sh").read_text()
    assert f"{{LLM_ALLREDUCE_CUDA_ARCHS:-{every}}}" in script
    assert len(every.split(";")) == 6
