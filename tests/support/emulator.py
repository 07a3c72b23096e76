"""The CUDA kernels on a CPU: builds the emulated library (tests/emulator/) once, and drives it.

The library is csrc/ as it stands, compiled by a C++ compiler, with the Python bindings of csrc/bindings/ in the same
module: ``library().native`` is what ``llm_allreduce_plugin._C`` is for GPUs.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import filelock
import pytest

from tests.support import kept

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ROOT / "csrc"
EMULATOR = ROOT / "tests" / "emulator"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-w",
    "-ffp-contract=off",  # as the library is compiled: one rounding for each operation
    "-fno-strict-aliasing",  # kernels see 16 bytes now as words, now as elements
    "-fno-gnu-unique",  # no variable is shared with the real library in the same process
    "-U_FORTIFY_SOURCE", "-fcf-protection=none",  # a thread's jumps go from stack to stack
)  # fmt: skip
# Kernels, of which there are hundreds, compile three times as fast so, and run hardly slower: most of the time is the
# emulator's own, and that of what kernels call of it, which tests/emulator/access.h has optimized for them, too.
KERNEL_FLAGS = ("-O0",)
EMULATOR_OPTIMIZATION = "-O2"
ERROR_BYTES = 4096

# For each file of csrc/: texts that occur once there, and what stands there instead.
Patches = Mapping[str, Sequence[tuple[str, str]]]


class EmulatorError(RuntimeError):
    """The emulated kernels cannot come to their end: threads wait at barriers for others that do not come."""


class BrokenContextError(RuntimeError):
    """A kernel has trapped, as it does when a wait has expired."""

    def __init__(self) -> None:
        super().__init__("a kernel has trapped")


def toolkit_headers() -> Path | None:
    """Where cuda_runtime.h lies, or None."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    homes += [str(Path(nvcc).resolve().parent.parent) if nvcc else None, "/usr/local/cuda"]
    homes += sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)
    homes += [str(Path(entry) / "nvidia" / "cu13") for entry in sys.path]
    for home in homes:
        if home and (Path(home) / "include" / "cuda_fp8.h").exists():
            return Path(home) / "include"
    return None


def _nanobind() -> Path | None:
    spec = importlib.util.find_spec("nanobind")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def obstacle() -> str | None:
    """Why the emulated library cannot be built here, or None."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler ({COMPILER})"
    if toolkit_headers() is None:
        return (
            "no headers of the CUDA toolkit: set CUDA_HOME, or install nvidia-cuda-runtime, nvidia-cuda-crt and "
            "nvidia-cuda-cccl of one CUDA release"
        )
    if _nanobind() is None:
        return "nanobind is not installed: pip install '.[test]'"
    return None


needs_emulator = pytest.mark.skipif(obstacle() is not None, reason=f"the emulator cannot be built: {obstacle()}")


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _digest_of_sources(patches: Patches) -> str:
    """Of everything that the library is made of."""
    files = [path for folder in (SOURCES, EMULATOR) for path in sorted(folder.rglob("*")) if path.is_file()]
    contents = [(str(path.relative_to(ROOT)), path.read_bytes()) for path in files]
    return _digest(FLAGS, KERNEL_FLAGS, EMULATOR_OPTIMIZATION, COMPILER, sys.version, sorted(patches.items()), contents)


def _cache() -> Path:
    return Path(os.environ.get("ALLREDUCE_EMULATOR_CACHE", ROOT / "build" / "emulator"))


def _run(command: Sequence[str], what: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        message = f"{what} does not compile for the emulator:\n{result.stderr[-4000:]}"
        raise RuntimeError(message)
    return result.stdout


def _made(made: Path, command: Sequence[str], what: str) -> Path:
    """A file that the command writes where ``-o`` says, unless it was made before."""
    if made.exists():
        kept.use(made)
    else:
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        _run([*command, "-o", str(partial)], what)
        partial.rename(made)
    return made


def _first_of_kernels(includes: Sequence[str]) -> Path:
    """The folder of cuda.h.gch: what every kernel begins with, compiled once, which takes a second each otherwise."""
    command = [COMPILER, *FLAGS, *KERNEL_FLAGS, *includes, "-x", "c++-header", str(EMULATOR / "cuda.h")]
    seen = _run([*command, "-E", "-P"], "cuda.h")
    folder = _cache() / "headers" / _digest(COMPILER, FLAGS, KERNEL_FLAGS, seen)
    return _made(folder / "cuda.h.gch", command, "cuda.h").parent


def _compile(source: Path, includes: Sequence[str], domain: str, first: Path) -> Path:
    """The object file of a source, which is compiled anew only when what the compiler sees of it has changed.

    ``domain``: of the types that nanobind binds; that of another library in the same process binds the same names.
    ``first``: see :func:`_first_of_kernels`.
    """
    command = [COMPILER, *FLAGS]
    if source.name in ("module.cpp", "nb_combined.cpp"):
        command += [f"-DNB_DOMAIN={domain}"]
    if source.suffix == ".cu":
        command += [*KERNEL_FLAGS, "-include", "cuda.h"]
    else:
        command += [EMULATOR_OPTIMIZATION if source.parent == EMULATOR else "-O1"]
    rest = [*includes, "-x", "c++", str(source)]
    seen = _run([*command, *rest, "-E", "-P"], source.name)
    digest = _digest(command, seen)
    if source.suffix == ".cu":
        command += [f"-I{first}"]
    made = _cache() / "objects" / f"{source.stem}-{digest}.o"
    return _made(made, [*command, *rest, "-c"], source.name)


def patched_sources(target: Path, patches: Patches) -> Path:
    """A copy of csrc/ in ``target``, with texts replaced: for each file, (old, new) that occur once.

    Raises:
        ValueError: a text does not occur exactly once: the code has changed, and so must the patch.
    """
    copy = target / "csrc"
    shutil.copytree(SOURCES, copy)
    for name, pairs in patches.items():
        text = (copy / name).read_text()
        for old, new in pairs:
            if text.count(old) != 1:
                message = f"csrc/{name}: {text.count(old)} occurrences of {old!r}, must be 1"
                raise ValueError(message)
            text = text.replace(old, new)
        (copy / name).write_text(text)
    return copy


def build(patches: Patches | None = None) -> Path:
    """The module with the emulated library, compiled unless that was done before for the same sources."""
    patches = patches or {}
    made = _cache() / _digest_of_sources(patches) / "_C.so"
    made.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(made.with_suffix(".lock")):
        if made.exists():
            kept.use(made)
            return made
        for folder in (_cache() / "objects", _cache() / "headers", _cache()):
            kept.prune(folder)
        with tempfile.TemporaryDirectory(dir=made.parent) as name:
            scratch = Path(name)
            sources = patched_sources(scratch, patches) if patches else SOURCES
            _link(sources, f"emulator_{_digest(sorted(patches.items()))}", scratch / "_C.so")
            (scratch / "_C.so").rename(made)
    return made


def _link(sources: Path, domain: str, target: Path) -> None:
    nanobind, toolkit = _nanobind(), toolkit_headers()
    assert nanobind is not None and toolkit is not None
    python = Path(sysconfig.get_path("include"))
    bindings = [nanobind / "include", nanobind / "ext" / "robin_map" / "include", python]
    folders = [EMULATOR / "include", EMULATOR, sources, sources / "include", toolkit, toolkit / "cccl", *bindings]
    includes = [f"-I{folder}" for folder in folders]
    first = _first_of_kernels(includes)
    files = [*sources.rglob("*.cu"), *sources.rglob("*.cpp"), *EMULATOR.glob("*.cpp"), *EMULATOR.glob("*.cu")]
    files.append(nanobind / "src" / "nb_combined.cpp")
    files.sort(key=lambda path: -path.stat().st_size if path.suffix == ".cu" else 0)  # the longest first
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, includes, domain, first), files))
    _run([COMPILER, "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(target)], target.name)


class Stream:
    """A stream of an emulated GPU."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle  # as torch's streams call it


class Library:
    """The emulated library: the bindings, and what only an emulator can do."""

    def __init__(self, path: Path) -> None:
        name = f"emulated_{path.parent.name}._C"
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        self.native: types.ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(self.native)
        self._c = ctypes.CDLL(str(path))
        self._c.emulator_stream.restype = ctypes.c_void_p
        self._c.emulator_now.restype = ctypes.c_int64
        self._c.emulator_host_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._c.emulator_reset.argtypes = [ctypes.c_uint64]
        self._c.emulator_soft_switch.argtypes = [
            ctypes.c_void_p, *[ctypes.c_uint] * 2, *[ctypes.c_void_p] * 3, *[ctypes.c_int] * 2, ctypes.c_void_p,
            *[ctypes.c_int] * 4,
        ]  # fmt: skip
        self._c.emulator_soft_switch_leave.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._c.emulator_multicast.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]

    def reset(self, seed: int) -> None:
        """Forget all streams, mend all GPUs. ``seed``: of who runs when; the same seed, the same run."""
        self._c.emulator_forget_multicast()
        self._c.emulator_reset(seed)

    def stream(self, device: int) -> Stream:
        """A new stream of this GPU."""
        return Stream(self._c.emulator_stream(device))

    def limit(self, device: int, *, blocks: int) -> None:
        """How many blocks this GPU has room for."""
        self._c.emulator_limit(device, 1, blocks)

    def add_host_memory(self, address: int, size: int) -> None:
        """Let stores to these bytes be under way when their kernel ends, until the next reset."""
        self._c.emulator_host_memory(address, size)

    def run(self) -> None:
        """Until all streams have done all that they were given.

        Raises:
            BrokenContextError: some kernel has trapped since the last reset.
            EmulatorError: they cannot come to their end.
        """
        text = ctypes.create_string_buffer(ERROR_BYTES)
        status = self._c.emulator_run(text, ctypes.c_size_t(len(text)))
        if status == 1:
            raise BrokenContextError
        if status != 0:
            raise EmulatorError(text.value.decode())

    def is_broken(self, device: int) -> bool:
        """Whether a kernel on this GPU has trapped."""
        return bool(self._c.emulator_is_broken(device))

    def hold_launches(self, hold: bool) -> None:
        """While held, no launch returns, as where a stream's queue is full."""
        self._c.emulator_hold_launches(int(hold))

    def held_launches(self) -> int:
        """How many threads are in a launch that is held."""
        return int(self._c.emulator_held_launches())

    def current_device(self) -> int:
        """As the CUDA runtime has it."""
        return int(self._c.emulator_current_device())

    def device_that_pinned(self) -> int:
        """Which was current when host memory was last pinned or let go; -1: never."""
        return int(self._c.emulator_device_that_pinned())

    def mutate(self, number: int) -> None:
        """Choose one of the errors that a patched library has been given; 0: none of them."""
        self._c.emulator_mutate(number)

    def row(
        self, algorithm: int, exchange: int, wire: int, epilogue: int, dtype: int, world_size: int, form: int
    ) -> tuple[int, int, int, bool] | None:
        """What the registry runs such a call with: the world size that the kernel is compiled for (0: any), the threads
        of a launch at most, those of a block beside them, and whether all blocks must run together."""
        found = (ctypes.c_int * 4)()
        if not self._c.emulator_row(algorithm, exchange, wire, epilogue, dtype, world_size, form, found):
            return None
        return found[0], found[1], found[2], bool(found[3])

    def soft_switch(self, stream: int, blocks: int, threads: int, arguments: Sequence[int]) -> None:
        """Start the kernel of soft_switch.cu; its arguments are addresses and integers."""
        assert self._c.emulator_soft_switch(stream, blocks, threads, *arguments) == 0

    def leave_soft_switch(self, stream: int, ended: int) -> None:
        """Count one rank more that stores nothing any more, behind the work of its stream."""
        assert self._c.emulator_soft_switch_leave(stream, ended) == 0

    def make_multicast(self, all_: Sequence[int], own: Sequence[int], size: int) -> None:
        """Each of the addresses ``all_`` is one of multicast memory at ``own``; no other is, until a reset."""
        self._c.emulator_forget_multicast()
        addresses = (ctypes.c_uint64 * len(own))(*own)
        for address in all_:
            self._c.emulator_multicast(address, size, addresses, len(own))

    def now_ns(self) -> int:
        """The emulated clock."""
        return int(self._c.emulator_now())


@functools.cache
def library() -> Library:
    """Of the sources as they are."""
    return Library(build())


def seeds(number: int) -> range:
    """So many of them, or as many for each as ALLREDUCE_EMULATOR_SEEDS says."""
    return range(number * int(os.environ.get("ALLREDUCE_EMULATOR_SEEDS", "1")))
