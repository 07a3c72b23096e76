"""The pages are current: the table is the policy's, and what they tell to type exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.config import environment_table

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of the build and of the scripts, not settings.
OTHER_VARIABLES = {"LLM_ALLREDUCE_CUDA_ARCHS", "LLM_ALLREDUCE_NVCC"}


def test_the_table_of_decisions_is_the_policys() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "decision_table.py"), "--check"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLM_ALLREDUCE_")}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, rest in re.findall(r"llm-allreduce ([a-z]+)([^`#|\n]*)", page.read_text()):
        assert name in commands, f"{page.name}: llm-allreduce {name}"
        known = {
            option for parameter in commands[name].params for option in [*parameter.opts, *parameter.secondary_opts]
        }
        used = set(re.findall(r"(?:^|\s)(--?[a-z][a-z_-]*)", rest))
        assert used <= known | {"--help"}, f"{page.name}: llm-allreduce {name} {used - known}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_variables_and_links_exist(page: Path) -> None:
    text = page.read_text()
    known = {variable for variable, _ in environment_table()} | OTHER_VARIABLES
    known |= {"LLM_ALLREDUCE_TIMEOUT"} if "LLM_ALLREDUCE_TIMEOUT='5': unknown key" in text else set()
    named = set(re.findall(r"LLM_ALLREDUCE_[A-Z_]*[A-Z]", text))
    assert named <= known, f"{page.name}: {named - known}"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    for target in re.findall(r"`((?:docs|scripts|configs|tests|csrc|benchmarks)/[\w/.]+\.\w+)`", text):
        assert (ROOT / target).exists(), f"{page.name}: {target}"
