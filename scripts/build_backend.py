"""The build backend: scikit-build-core, plus a CUDA compiler from PyPI wheels where the machine has none.

A build needs nvcc 12.8 or newer (the first to know every architecture of the release wheel). It is looked for in
CUDACXX, CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda; otherwise five wheels of one CUDA release are added to the
isolated build environment. LLM_ALLREDUCE_NVCC=wheels takes the wheels in any case.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403  (the hooks that are not wrapped below)

OLDEST_NVCC = (12, 8)

# One release: nvcc does not pull the CUDA C++ headers by itself, and mixed releases fail inside them.
NVCC_WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]


def _release(nvcc: Path) -> tuple[int, int] | None:
    try:
        text = subprocess.run(  # noqa: S603  (the machine's own compiler)
            [nvcc, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def installed_nvcc() -> Path | None:
    """The machine's own nvcc, when it is recent enough."""
    if os.environ.get("LLM_ALLREDUCE_NVCC") == "wheels":
        return None
    candidates = [os.environ.get("CUDACXX")]
    candidates += [f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        release = _release(Path(candidate)) if candidate else None
        if release and release >= OLDEST_NVCC:
            return Path(candidate)
        if release:
            print(f"{candidate} is CUDA {release[0]}.{release[1]}; this build needs 12.8 or newer", file=sys.stderr)
    return None


def _wheel_root() -> Path:
    for entry in sys.path:
        root = Path(entry) / "nvidia" / "cu13"
        if (root / "bin" / "nvcc").exists():
            return root
    raise RuntimeError(
        "no nvcc: install a CUDA toolkit (12.8 or newer), or build with build isolation so that these can be "
        "installed: " + " ".join(NVCC_WHEELS)
    )


def _use_cuda_compiler() -> None:
    nvcc = installed_nvcc()
    if nvcc is None:
        root = _wheel_root()
        nvcc = root / "bin" / "nvcc"
        # The wheels keep libraries in lib; nvcc looks in lib64.
        os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(root / "lib"), os.environ.get("LIBRARY_PATH")]))
    os.environ["CUDACXX"] = str(nvcc)


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    requires = _backend.get_requires_for_build_wheel(config_settings)
    return requires if installed_nvcc() else [*requires, *NVCC_WHEELS]


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    requires = _backend.get_requires_for_build_editable(config_settings)
    return requires if installed_nvcc() else [*requires, *NVCC_WHEELS]


def build_wheel(directory: str, config_settings: dict | None = None, metadata_directory: str | None = None) -> str:
    _use_cuda_compiler()
    return _backend.build_wheel(directory, config_settings, metadata_directory)


def build_editable(directory: str, config_settings: dict | None = None, metadata_directory: str | None = None) -> str:
    _use_cuda_compiler()
    return _backend.build_editable(directory, config_settings, metadata_directory)
