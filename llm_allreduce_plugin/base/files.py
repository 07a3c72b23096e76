"""Small files, read and written so that nothing that lies or happens there can harm whoever does it.

A path may come from a setting, and what lies behind it from anyone: a pipe that never ends, a device, a file of many
gigabytes, text in another encoding. And a folder may belong to others too, who can foresee the names in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from llm_allreduce_plugin.errors import UnreadableFileError

MOST_BYTES = 1 << 20


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a regular file of at most ``most_bytes`` bytes of UTF-8. Never waits, whatever ``path`` is.

    Raises:
        UnreadableFileError: it cannot be read, is no regular file, is larger, or holds something else than text.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UnreadableFileError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnreadableFileError(path, "is not a regular file")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise UnreadableFileError(path, f"cannot be read: {error.strerror or error}") from error
    finally:
        os.close(descriptor)
    if len(data) > most_bytes:
        raise UnreadableFileError(path, f"is larger than {most_bytes} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnreadableFileError(path, "is not UTF-8 text") from None


def parse_json(path: Path, text: str) -> Any:  # noqa: ANN401
    """What JSON text holds. ``path``: where it is from, for errors.

    Raises:
        UnreadableFileError: it is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except ValueError as error:  # also for a number of thousands of digits
        raise UnreadableFileError(path, f"is not valid JSON: {error}") from error
    except RecursionError:
        raise UnreadableFileError(path, "is nested too deeply") from None


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:  # noqa: ANN401
    """What a JSON file holds.

    Raises:
        UnreadableFileError: as of :func:`read_text` and :func:`parse_json`.
    """
    return parse_json(path, read_text(path, most_bytes))


def replace_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replace a file atomically: a reader sees the old or the new one, never half of one. Leaves nothing else behind.

    The new file is made exclusively and under a name that nobody can foresee, so that nothing that somebody else has
    put into the folder is followed or overwritten. ``mode``: before the process's umask.

    Raises:
        OSError: it cannot be written; the same failure has the same text.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _replace_by(partial, path, text, mode)
    except OSError as error:
        # Who writes again and again tells a failure once, and knows it by its text: that must not have a random name.
        raise OSError(error.errno, error.strerror, str(path)) from None


def _replace_by(partial: Path, path: Path, text: str, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(partial, flags, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
