"""What the CUDA toolkit's tools say about the built library."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import struct
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


def tool(name: str) -> str | None:
    """The path of a tool, from the CUDA toolkit or from the wheel that the test extra installs; None: there is none."""
    wheel = [Path(entry) / "nvidia" / "cu13" / "bin" for entry in sys.path]
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", *map(str, wheel)]))


def cuobjdump(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Output of cuobjdump, run in the folder ``cwd``."""
    path = tool("cuobjdump")
    assert path is not None, "cuobjdump is missing: pip install '.[test]'"
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True, cwd=cwd).stdout


def ptx_of_kernels(library: Path) -> dict[tuple[str, str], str]:
    """The PTX that the library holds, by architecture and kernel."""
    found = {}
    for part in cuobjdump("--dump-ptx", library).split("\n.target sm_")[1:]:
        architecture = part[: part.index("\n")].strip()
        for entry in re.split(r"^(?:\.visible )?\.entry ", part, flags=re.MULTILINE)[1:]:
            name = re.match(r"\w+", entry)
            assert name is not None
            found[architecture, name[0]] = entry
    return found


def cubins(library: Path, folder: Path) -> list[tuple[str, Path]]:
    """Writes the machine code that the library holds into a folder: (architecture, file)."""
    cuobjdump("--extract-elf", "all", library.absolute(), cwd=folder)
    return [
        (match[1], path) for path in sorted(folder.iterdir()) if (match := re.search(r"\.sm_(\d+)\.cubin", path.name))
    ]


def machine_code(cubin: Path) -> dict[str, bytes]:
    """The instructions of every kernel in an ELF file of 64 bits: 16 bytes each."""
    data = cubin.read_bytes()
    (sections_at,) = struct.unpack_from("<Q", data, 0x28)
    size, number, names = struct.unpack_from("<3H", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", data, sections_at + size * index) for index in range(number)]
    found = {}
    for name_at, _, _, _, at, length in sections:
        start = sections[names][4] + name_at
        name = data[start : data.index(b"\0", start)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = data[at : at + length]
    return found


def disassembled(cubin: Path) -> dict[str, str]:
    """By kernel: one line to an instruction, its first word behind it."""
    path = tool("nvdisasm")
    assert path is not None, "nvdisasm is missing: pip install '.[test]'"
    listing = subprocess.run([path, "-c", "-hex", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\w+):$", listing, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def runs_on(code: str, architecture: str) -> bool:
    """Whether machine code of ``code`` runs on a GPU of ``architecture``: CUDA's binary compatibility.

    Both as compute capabilities without the dot: a GPU of the same generation that is not older.
    """
    return int(code) // 10 == int(architecture) // 10 and int(code) <= int(architecture)


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
