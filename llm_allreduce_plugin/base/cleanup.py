"""Steps that must all be tried, whatever becomes of one of them."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Protocol

from llm_allreduce_plugin.base.attempt import Attempt

logger = logging.getLogger(__name__)


class Closable(Protocol):
    """What can be closed."""

    def close(self) -> None:
        """Let go of it."""


def quietly(step: Callable[[], object], what: str) -> bool:
    """Run a step of a clean-up. It must not replace the error that is on its way: what it raises goes to the log.

    Args:
        step: what to do.
        what: the same in words, to follow "cannot": ``"unmap shared memory"``.

    Returns:
        Whether it worked.
    """
    try:
        step()
    except Exception as error:  # noqa: BLE001  (any, see above)
        logger.warning("cannot %s: %s: %s", what, type(error).__name__, error)
        return False
    return True


class Ending:
    """Steps of an end: each is tried, whatever became of those before, and what they raised is told at the end.

    Attributes:
        errors: what steps have raised, in order.
    """

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def step(
        self,
        step: Callable[[], object],
        what: str,
        wait_s: float | None = None,
        more_s: Callable[[], float] = lambda: 0.0,
    ) -> bool:
        """Run one. ``wait_s``: it may block; it then runs in a daemon thread, and is left there after so many seconds.

        ``more_s``: asked then, for seconds that it is waited for once more.

        Returns:
            Whether it has ended, even if by raising.
        """
        try:
            if wait_s is None:
                step()
                return True
            attempt = Attempt(step, "ending")
            if not attempt.wait(wait_s) and not attempt.wait(longer_s := more_s()):
                logger.warning("cannot %s: not done after %.3g s", what, wait_s + longer_s)
                return False
            attempt.result()
        except Exception as error:  # noqa: BLE001  (any: the steps that follow must run)
            self.errors.append(error)
        return True

    def raise_first(self) -> None:
        """Raise the first error; further ones go to the log."""
        for error in self.errors[1:]:
            logger.warning("another error at the end: %s: %s", type(error).__name__, error)
        if self.errors:
            raise self.errors[0]


def let_go(memory: Closable, *others: object, in_use: bool) -> None:
    """Close memory after something else went wrong, and never raise.

    ``in_use``: something that does not answer may still use it and ``others``, which then must stay: freeing memory
    waits for a GPU that hangs, and holds the interpreter meanwhile.
    """
    if in_use:
        logger.warning("memory is kept until this process ends: a GPU does not answer, and may still use it")
        keep_for_ever(memory, *others)
    else:
        quietly(memory.close, "let go of shared memory")


def keep_for_ever(*held: object) -> None:
    """Let nothing of it be freed as long as the process lives: something outside Python may still use it."""
    for one in held:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
