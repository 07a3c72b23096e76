"""Functions that may never return, run so that whoever waits for them need not wait for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
