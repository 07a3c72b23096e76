"""Files in memory that no folder lists."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from llm_allreduce_plugin.base.containers import CGROUP, memory_of_container

SHM_FOLDER = Path("/dev/shm")  # noqa: S108  (POSIX shared memory is the point)
_MEMINFO = Path("/proc/meminfo")


def create(size: int) -> int:
    """A descriptor of a file of ``size`` zeros in memory, of mode 0600, whose size can never change.

    It does not count against the size of ``/dev/shm``, but against the memory of machine and container.

    Raises:
        OSError: there is not enough memory, or no such files.
    """
    _check_available(size)
    try:
        descriptor = os.memfd_create("llm-allreduce", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):  # a sandbox without that call
        return create_in_folder(size)
    try:
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def create_in_folder(size: int) -> int:
    """The same on the file system of ``/dev/shm``, whose limits it counts against.

    Raises:
        OSError: there is not enough room, or no such folder.
    """
    _check_available(size)
    try:
        descriptor = os.open(SHM_FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OSError(error.errno, f"in {SHM_FOLDER}: {error.strerror}") from error
    try:
        os.ftruncate(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def reserve(descriptor: int, first: int, length: int) -> None:
    """Take the pages of a part now.

    So too little memory is an error here, not a SIGBUS in the middle of a sum, and each part lies in memory near the
    rank that writes it.

    Raises:
        OSError: there is not enough room.
    """
    os.posix_fallocate(descriptor, first, length)


def _check_available(size: int) -> None:
    available = available_bytes()
    if available is not None and size > available:
        raise OSError(errno.ENOMEM, f"only {available} bytes of memory are available")


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Memory that may still be taken, of the machine and of the container; None: not known.

    Taking more does not fail: it ends a process.
    """
    found = [left for left in (_of_machine(meminfo), _of_container(cgroup)) if left is not None]
    return min(found) if found else None


def _fields(path: Path) -> dict[str, int]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {parts[0].rstrip(":"): int(parts[1]) for parts in lines if len(parts) > 1 and parts[1].isdigit()}


def _of_machine(meminfo: Path) -> int | None:
    try:
        return _fields(meminfo)["MemAvailable"] << 10
    except (OSError, ValueError, KeyError):
        return None


def _of_container(cgroup: Path) -> int | None:
    """By its control group; what it caches of files can be dropped."""
    found = memory_of_container(cgroup)
    if found is None or found.limit is None:
        return None
    try:
        parts = _fields(found.statistics)
        files = parts.get("file", parts.get("cache", 0))  # version 2, version 1
    except (OSError, ValueError):
        return None
    return max(0, found.limit - found.used + files - parts.get("shmem", 0))
