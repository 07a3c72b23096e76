"""What cuobjdump says about the built library."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class KernelResources:
    """Resources of one kernel on one architecture: registers per thread, bytes of stack and of local memory."""

    name: str
    architecture: str
    registers: int
    stack: int
    local: int


def library_path() -> Path:
    """The installed kernel library."""
    from llm_allreduce_plugin import _C

    return Path(_C.__file__).parent / "libllm_allreduce.so"


def cuobjdump(*arguments: str | Path) -> str:
    """Output of cuobjdump, from the CUDA toolkit or from the wheel that the test extra installs."""
    wheel = [Path(entry) / "nvidia" / "cu13" / "bin" for entry in sys.path]
    tool = shutil.which(
        "cuobjdump", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", *map(str, wheel)])
    )
    assert tool is not None, "cuobjdump is missing: pip install '.[test]'"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@functools.cache
def kernel_resources(library: Path) -> tuple[KernelResources, ...]:
    """Every kernel of the library on every architecture. A process reads it once."""
    found = []
    architecture = ""
    usage = cuobjdump("--dump-resource-usage", library)
    pattern = re.compile(r"arch = sm_(\d+)|Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
    for match in pattern.finditer(usage):
        if match[1]:
            architecture = match[1]
            continue
        found.append(KernelResources(match[2], architecture, int(match[3]), int(match[4]), int(match[5])))
    return tuple(found)
