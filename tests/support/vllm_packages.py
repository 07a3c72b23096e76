"""Versions of vLLM that tests run: the installed one, and those whose Python code is unpacked.

``scripts/test.sh`` unpacks two. ``ALLREDUCE_TEST_VLLM`` names other folders that ``scripts/unpack_engine.sh`` made,
separated by colons.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALLED = "installed"
# What scripts/test.sh has unpacked.
UNPACKED = sorted(str(folder) for folder in (ROOT / ".venv" / "vllm").glob("*") if (folder / "vllm").is_dir())
PACKAGES = [INSTALLED, *(list(filter(None, os.environ.get("ALLREDUCE_TEST_VLLM", "").split(":"))) or UNPACKED)]


def name_of(package: str) -> str:
    return Path(package).name


def run_module(package: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -m`` of a module in a process of that version, on CPU ranks. It must end well."""
    paths = [*([] if package == INSTALLED else [str(Path(package).resolve())]), str(ROOT)]
    result = subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env={**os.environ, "VLLM_TARGET_DEVICE": "cpu", **variables, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result
