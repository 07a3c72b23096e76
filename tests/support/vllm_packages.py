"""Versions of vLLM that tests run: the installed one, and those whose Python code is unpacked.

``scripts/test.sh`` unpacks two. ``ALLREDUCE_TEST_VLLM`` names other folders that ``scripts/unpack_engine.sh`` made,
separated by colons.
"""

from __future__ import annotations

import subprocess

from tests.support import packages

PACKAGES = packages.packages("vllm", "ALLREDUCE_TEST_VLLM")


def run_module(package: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """See :func:`packages.run_module`."""
    return packages.run_module(package, *words, environment={"VLLM_TARGET_DEVICE": "cpu", **variables})
