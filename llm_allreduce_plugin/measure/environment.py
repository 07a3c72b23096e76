"""What a recorded result must name: the machine, the versions, the commit and the command. And how it is written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llm_allreduce_plugin.base.files import replace_text

# Of a checkout. Of an installed package, the folder that it lies in.
ROOT = Path(__file__).resolve().parents[2]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return ""


def _command() -> str:
    """As it would be typed anywhere: without the place of an installed script."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":  # python -m
        return shlex.join(["llm-allreduce", *sys.argv[1:]])
    if program.suffix != ".py":
        return shlex.join([program.name, *sys.argv[1:]])
    return shlex.join(["python", *sys.argv])


def commit() -> str:
    """What of this package runs: ``BENCHMARK_COMMIT``, else the commit of its checkout; empty where that is unknown.

    Of an installed package it is: a repository that its folder or the current one lies in is another's.
    """
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    found = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD").splitlines()
    return found[1] if len(found) == 2 and Path(found[0]).resolve() == ROOT else ""  # noqa: PLR2004


def environment() -> dict[str, Any]:
    """GPU, driver, CUDA, torch, NCCL, the engines, this package, commit, command and the switches that matter.

    The commit is that of this package's checkout, or ``BENCHMARK_COMMIT`` where that came without its history.
    """
    versions = {}
    for package in ("llm_allreduce_plugin", "vllm", "sglang", "flashinfer-python"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": f"{len(gpus)} x {gpus[0]}" if gpus else "none",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else "",  # type: ignore[no-untyped-call]
        "python": sys.version.split()[0],
        **versions,
        "commit": commit(),
        "command": _command(),
        "switches": {
            name: os.environ[name]
            for name in ("NCCL_P2P_DISABLE", "NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST")
            if name in os.environ
        },
    }


def write_record(path: Path, rows: list[dict[str, Any]], **fields: Any) -> None:  # noqa: ANN401
    """Write ``fields`` and ``rows``, a line to each row, with the :func:`environment` they were measured in.

    Makes missing folders. A record that was there before is replaced as a whole.

    Raises:
        OSError: it cannot be written.
    """
    record = json.dumps({"environment": environment(), **fields}, indent=1)
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{record[:-2]},\n "rows": [\n{lines}\n]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_char_device():  # /dev/null is written to, not replaced
        path.write_text(text)
    else:
        replace_text(path.resolve(), text)
