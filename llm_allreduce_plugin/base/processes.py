"""Processes that end together: children with their parent, and all of them when a signal says so."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import multiprocessing.resource_tracker
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Of what is done when a signal ends a command; then the kernel ends it.
LAST_SECONDS = 4.0
_SHOW_CURSOR = b"\x1b[?25h"  # progress bars hide it

_last_things: dict[int, Callable[[], object]] = {}
_numbers = itertools.count()


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process as soon as ``parent``, which started it, has ended in whatever way.

    Strictly, as soon as the thread has ended that started it. It holds for a process that is stopped or blocked too.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def run_child(parent: int, module: str, function: str, *arguments: Any) -> None:  # noqa: ANN401
    """In a child: ``module.function(*arguments)``, bound to the parent before anything that takes long is imported.

    Ctrl-C, which a terminal sends to all of a process group, is the parent's to answer: a child has a group of its own.
    """
    end_with_parent(parent)
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # drops one that came before
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    getattr(importlib.import_module(module), function)(*arguments)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Children that are started here get no Ctrl-C before :func:`run_child` has said what it means to them."""
    # With the first child that is spawned multiprocessing starts this process, and lets Ctrl-C in again behind it.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def how_it_ended(exit_code: int | None) -> str:
    """``"was killed by SIGKILL"`` or ``"ended with exit code 3"``, from an exit code as of a ``Process``."""
    if exit_code is None or exit_code >= 0:
        return "ended" if exit_code is None else f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


def at_last(action: Callable[[], object]) -> Callable[[], None]:
    """Do something when a signal ends this command: end a child, write what there is. Returns what forgets it again."""
    number = next(_numbers)
    _last_things[number] = action
    return lambda: _last_things.pop(number, None) and None


def end_on_signals(name: Callable[[], str]) -> None:
    """Let SIGINT, SIGTERM and SIGHUP end this command: what :func:`at_last` was told, one line, exit code 128 + signal.

    Not by an exception: what is interrupted may be a destructor or a callback, where Python prints and drops it. A
    signal that whoever started this lets it ignore (``nohup``) stays ignored.

    Args:
        name: what this command is called, asked when it ends.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        for ending in _ENDING:
            signal.signal(ending, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, LAST_SECONDS)
        for action in reversed(list(_last_things.values())):
            with contextlib.suppress(Exception):
                action()
        line = f"{name()}: ended by {signal.Signals(number).name}\n".encode()
        with contextlib.suppress(OSError):
            os.write(2, (_SHOW_CURSOR + b"\r" if os.isatty(2) else b"") + line)
        os._exit(128 + number)

    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def command_name() -> str:
    """``llm-allreduce bench``, from the command line."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    return " ".join(["llm-allreduce", *words[:1]])
