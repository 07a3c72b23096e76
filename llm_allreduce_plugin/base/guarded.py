"""Things that are done beside the service, and must not harm it: whatever happens in one ends neither it nor others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Guarded:
    """A function that is called again and again and never raises.

    A failure goes into the log once, until it is another one; and so does the first success after it.

    Args:
        what: is done, for the log: ``"report_dir=/a cannot be written"``.
        works: for the log, when it works again.
        run: does it.
        retry_s: seconds until it is tried again after a failure.
    """

    def __init__(self, what: str, works: str, run: Callable[[], object], retry_s: float = 0.0) -> None:
        self._what = what
        self._works = works
        self._run = run
        self._retry_s = retry_s
        self._failure: str | None = None
        self._not_before = 0.0

    def __call__(self, *, now: bool = False) -> bool:
        """Do it, unless it has failed a moment ago and ``now`` is off. True when it worked."""
        if not now and time.monotonic() < self._not_before:
            return False
        try:
            self._run()
        except Exception as error:  # noqa: BLE001  (whatever it is, what runs beside it goes on)
            failure = f"{type(error).__name__}: {error}"
            if failure != self._failure:
                logger.warning("%s: %s; it is tried again", self._what, failure)
            self._failure = failure
            self._not_before = time.monotonic() + self._retry_s
            return False
        if self._failure is not None:
            logger.info("%s", self._works)
            self._failure = None
        return True
