"""Functions that may never return, run so that whoever waits for them need not wait for ever."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Attempt(Generic[T]):
    """A function that runs in a daemon thread of its own: one that never returns ends with the process.

    Args:
        function: what to run.
        name: of the thread, for whoever looks at a stuck process.
    """

    def __init__(self, function: Callable[[], T], name: str) -> None:
        self._function = function
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name=f"llm-allreduce-{name}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result.append(self._function())
        except BaseException as error:  # noqa: BLE001  (raised where the result is asked for)
            self._error = error
        finally:
            del self._function  # and what it holds
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
