"""A folder of what was built, of which only what is still used is kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

DAY_S = 24 * 3600.0
UNUSED_S = 7 * DAY_S


def use(path: Path) -> None:
    """Say that it is used: it is kept from now on for as long as something new is."""
    with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
        os.utime(path)


def prune(folder: Path, unused_s: float = UNUSED_S) -> list[str]:
    """Delete files, and folders with all that is in them, of which nothing was used for so many seconds.

    Others may build in the same folder: what is used or made meanwhile stays.

    Returns:
        The names of what is gone.
    """
    gone = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if time.time() - _last_used(path) < unused_s:
            continue
        with contextlib.suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            gone.append(path.name)
    return gone


def _last_used(path: Path) -> float:
    """By the wall clock; of a folder, what was used last in it."""
    times = []
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times, default=time.time())
