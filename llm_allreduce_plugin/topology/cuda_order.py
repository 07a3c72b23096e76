"""In which order CUDA counts the GPUs of a node. Only CUDA knows: its default, fastest first, is a heuristic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

VARIABLE = "CUDA_VISIBLE_DEVICES"
TIMEOUT_S = 20.0  # a driver that has to wake up eight GPUs takes seconds

# In a process of its own, because a process that has started CUDA can neither start it again with other variables nor
# fork ranks that use it. Prints a UUID to a line; exit code 1: there is no CUDA here.
PROGRAM = """
import ctypes, sys, uuid
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    sys.exit(1)
count = ctypes.c_int()
if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
    sys.exit(1)
found = []
for number in range(count.value):
    device, name = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if cuda.cuDeviceGet(ctypes.byref(device), number) or cuda.cuDeviceGetUuid_v2(name, device):
        sys.exit(1)
    found.append(f"GPU-{uuid.UUID(bytes=bytes(name))}")
print(*found, sep="\\n")
"""


def ask(
    command: Sequence[str] = (sys.executable, "-I", "-c", PROGRAM), timeout_s: float = TIMEOUT_S
) -> list[str] | None:
    """UUIDs of all GPUs of this node in CUDA's order, hidden ones too; None when CUDA does not answer in time."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    try:
        answer = subprocess.run(  # noqa: S603
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.decode(errors="replace").split()
