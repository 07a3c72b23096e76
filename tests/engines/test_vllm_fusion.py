"""Our pass on graphs that vLLM's own layers make: of the version that is installed, and of others that are unpacked.

``scripts/test.sh`` unpacks two. ``ALLREDUCE_TEST_VLLM`` names other folders that ``scripts/unpack_engine.sh`` made,
separated by colons.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
INSTALLED = "installed"
# What scripts/test.sh has unpacked.
UNPACKED = sorted(str(folder) for folder in (ROOT / ".venv" / "vllm").glob("*") if (folder / "vllm").is_dir())
PACKAGES = [INSTALLED, *(list(filter(None, os.environ.get("ALLREDUCE_TEST_VLLM", "").split(":"))) or UNPACKED)]


@functools.cache
def faults_of(package: str) -> dict[str, str | None]:
    """The faults of every case of ``tests.support.fusion_cases``, in one process of that version."""
    paths = [*([] if package == INSTALLED else [str(Path(package).resolve())]), str(ROOT)]
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.fusion_cases"],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env={**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_PLUGINS": "", "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    faults: dict[str, str | None] = json.loads(result.stdout.splitlines()[-1])
    return faults


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: Path(package).name)
@pytest.mark.parametrize(
    "what",
    [
        "RMSNorm, ", "GemmaRMSNorm, ", "layer, ", "gemma_layer, ", "native, ", "native_gemma, ", "custom, ",
        "transformers, ", "left alone: ", "norm only: ", "layers: ", "batch dimension", "pass manager",
        "compile ranges",
    ],
)  # fmt: skip
def test_boundaries_are_fused_as_they_are_written(package: str, what: str) -> None:
    of_these = {name: fault for name, fault in faults_of(package).items() if name.startswith(what)}
    assert of_these
    assert [f"{name}: {fault}" for name, fault in of_these.items() if fault is not None] == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: Path(package).name)
def test_every_quantization_was_tried(package: str) -> None:
    names = faults_of(package)
    for quant in (
        "static", "token", "group", "group columns", "group aligned columns", "group packed", "nvfp4 swizzled",
        "nvfp4 linear", "native static", "native token", "native group", "native group columns",
    ):  # fmt: skip
        assert {f"RMSNorm, {place}, {quant}, bfloat16" for place in ("first", "middle")} <= names.keys()
        assert f"RMSNorm, middle, {quant}, and norm, bfloat16" in names
        for norm in ("GemmaRMSNorm", "native", "native_gemma", "custom", "transformers"):
            assert f"{norm}, middle, {quant}, bfloat16" in names
