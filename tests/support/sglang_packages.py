"""Versions of SGLang that tests run: the installed one, and those whose Python code is unpacked; on CPU ranks.

``ALLREDUCE_TEST_SGLANG`` names folders that ``scripts/unpack_engine.sh`` made, separated by colons, for more versions;
those that it made with ``--whole`` can be served with, too.
"""

from __future__ import annotations

import os
import subprocess

from tests.support import packages

PACKAGES = packages.packages("sglang", "ALLREDUCE_TEST_SGLANG")
CPU = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # For which a server would wait a minute when a rank has ended.
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
}


def run_module(package: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A module of ``tests.support`` with that version of SGLang."""
    environment = {name: value for name, value in CPU.items() if name != "TORCHDYNAMO_DISABLE"} | variables
    return packages.run_module(package, *words, environment=environment, more_paths=os.environ.get("PYTHONPATH", ""))
