"""Functions that may never return, run so that whoever waits for them need not wait for ever."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_LAST_WAIT_S = 2.0  # at the end of the process, for all that was left to itself
_under_way: set[Attempt[Any]] = set()


class Attempt(Generic[T]):
    """A function that runs in a daemon thread of its own: one that never returns ends with the process.

    The process waits for it a moment, though. A thread that comes back from torch's C++ while the interpreter ends is
    ended there, and takes the process with it by SIGABRT ("terminate called without an active exception").

    Args:
        function: what to run.
        name: of the thread, for whoever looks at a stuck process.

    Raises:
        RuntimeError: there can be no thread: some releases of Python start none once the interpreter ends.
    """

    def __init__(self, function: Callable[[], T], name: str) -> None:
        self._function = function
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._ended = threading.Event()
        thread = threading.Thread(target=self._run, name=f"llm-allreduce-{name}", daemon=True)
        _under_way.add(self)
        try:
            thread.start()
        except RuntimeError:
            _under_way.discard(self)
            raise

    def _run(self) -> None:
        try:
            self._result.append(self._function())
        except BaseException as error:  # noqa: BLE001  (raised where the result is asked for)
            self._error = error
        finally:
            del self._function  # and what it holds
            _under_way.discard(self)
            self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether it has returned or raised."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        return self._ended.wait(seconds)

    def result(self) -> T:
        """What the function returned, once it has ended; may be asked for once.

        Raises:
            BaseException: what the function raised.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._result.pop()


def _wait_at_exit() -> None:
    deadline = time.monotonic() + _LAST_WAIT_S
    for attempt in tuple(_under_way):
        attempt.wait(max(0.0, deadline - time.monotonic()))


atexit.register(_wait_at_exit)
os.register_at_fork(after_in_child=_under_way.clear)  # a child has none of these threads


class EndsWhenUnused:
    """What ends when it has been closed and nothing uses it any more.

    For what a step uses that may have been given up, but still be on its way, or never return.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._over = False

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Until its end, nothing is let go of.

        Raises:
            RuntimeError: it has been closed already.
        """
        with self._lock:
            if self._over:
                message = "this rank has given up before"
                raise RuntimeError(message)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                is_last = self._over and not self._users
            if is_last:
                self._let_go()

    def _end(self, name: str, seconds: float) -> bool:
        """Close it. False when letting go, in a thread of this ``name``, has not ended by then. Idempotent."""
        with self._lock:
            is_last = not self._over and not self._users
            self._over = True
        return not is_last or Attempt(self._let_go, name).wait(seconds)

    def _let_go(self) -> None:
        raise NotImplementedError
