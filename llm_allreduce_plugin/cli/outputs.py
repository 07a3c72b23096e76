"""Files that commands write: whether they can is found out before any work, and said in one way."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import typer

from llm_allreduce_plugin.base.validation import printable


def check_file(option: str, path: Path | None, *, devices: bool = True) -> None:
    """That ``option`` names a file that can be written, or one that can be made in a folder that can. Leaves nothing.

    Args:
        option: as a user writes it.
        path: its value.
        devices: something like ``/dev/null`` will do too.

    Raises:
        typer.Exit: after an error that names the option, its value, and what to do.
    """
    if path is None:
        return
    try:
        mode = _mode_of(path)
        if stat.S_ISDIR(mode):
            _refuse(option, path, "is a folder", "give the name of a file in it")
        if devices and stat.S_ISCHR(mode):
            return
        if mode and not stat.S_ISREG(mode):
            _refuse(option, path, "is not a regular file", "give the name of another")
        folder = Path(os.path.realpath(path)).parent
        while not folder.exists():  # what is missing of the path is made when the file is
            folder = folder.parent
        if not folder.is_dir():
            _refuse(option, path, f"{folder} is not a folder", "give a file in a folder")
        _try(folder)
        _check_length(path, folder)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        _refuse(option, path, f"cannot be written: {reason}", "give a file in a folder that you can write to")


def check_picture(option: str, path: Path | None) -> None:
    """That ``option`` names a picture that can be drawn and written.

    Raises:
        typer.Exit: after an error that names the option, its value, and what to do.
    """
    if path is None:
        return
    check_file(option, path)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        _refuse(option, path, "needs matplotlib, which is not installed", "pip install matplotlib")
    else:
        known = sorted(FigureCanvasBase.get_supported_filetypes())
        if path.suffix.lower().removeprefix(".") not in known:
            _refuse(option, path, f"the suffix {path.suffix!r} is no kind of picture", f"use one of {', '.join(known)}")


@contextlib.contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Around what writes a file that was checked before: a disk can fill up meanwhile.

    Raises:
        typer.Exit: after the error was printed.
    """
    try:
        yield
    except OSError as error:
        typer.echo(f"error: {printable(f'{option} {path}')}: cannot be written: {error.strerror or error}", err=True)
        raise typer.Exit(2) from None


def _refuse(option: str, path: Path, reason: str, advice: str) -> NoReturn:
    typer.echo(printable(f"error: {option} {path}: {reason}: {advice}"), err=True)
    raise typer.Exit(2)


def _mode_of(path: Path) -> int:
    """Kind and permissions of what lies there, links followed; 0 where nothing does."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _try(folder: Path) -> None:
    """Make a file without a name; permissions alone do not tell what a file system allows."""
    with contextlib.suppress(OSError):
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        return
    # Not every file system knows files without a name.
    probe = folder / f".llm-allreduce-{secrets.token_hex(8)}"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    probe.unlink()


def _check_length(path: Path, folder: Path) -> None:
    most = os.pathconf(folder, "PC_NAME_MAX")
    names = [os.fsencode(part) for part in path.parts]
    # The file is written under a longer name first.
    if any(len(name) > most - 20 for name in names):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
