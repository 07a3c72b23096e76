"""Versions of an engine that tests run: the installed one, and those whose Python code is unpacked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALLED = "installed"


def unpacked(engine: str) -> list[str]:
    """Folders in which ``scripts/test.sh`` has unpacked versions of it."""
    return sorted(str(folder) for folder in (ROOT / ".venv" / engine).glob("*") if (folder / engine).is_dir())


def packages(engine: str, variable: str) -> list[str]:
    """The installed one and those; or, beside the installed one, the folders that an environment variable names."""
    named = filter(None, os.environ.get(variable, "").split(":"))
    return [INSTALLED, *(list(named) or unpacked(engine))]


def name_of(package: str) -> str:
    return Path(package).name


def run_module(
    package: str, *words: str, environment: Mapping[str, str], more_paths: str = ""
) -> subprocess.CompletedProcess[str]:
    """``python -m`` of a module in a process of that version, on CPU ranks. It must end well."""
    paths = ["" if package == INSTALLED else str(Path(package).resolve()), str(ROOT), more_paths]
    result = subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result
