"""Watches exchanges between hosts, whose own waits are not bounded: says who is missing, and ends what waits for it.

Every rank tells the ranks that it exchanges sums with, through the group's store, that it lives, how many exchanges it
has begun and ended, and why it has stopped. A thread of its own does that: a store may never answer. Whoever asks
:meth:`HostWatch.look` gets by with what the thread has heard.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import Store

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.errors import AllReduceError, PeerTimeoutError
from llm_allreduce_plugin.group.places import Places
from llm_allreduce_plugin.transport.rail import Rail

NAME, PHASE = "HOSTS", "exchange"
_LONGEST_BEAT_S = 1.0
_BEATS_OF_SILENCE = 3
_MOST_TEXT = 400


@dataclasses.dataclass
class _Sign:
    """What was last heard of a rank, and when by this rank's clock."""

    begun: int = 0
    state: str = "open"
    text: str = ""
    heard_s: float = 0.0
    raw: bytes = b""


class HostWatch:
    """Of one communicator.

    Args:
        store: through which ranks tell each other; this watch's own connection.
        prefix: of its keys, the same on all ranks, unlike any other group's.
        places: of this rank.
        workspace: whose exchanges are watched.
        rail: that is let go when an exchange has failed.
        timeout_s: how long an exchange may last.
        first_timeout_s: the same before the first has ended.
        failure: what else has broken this rank's group, or None.

    Attributes:
        error: what has broken the exchange, once it is known.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        places: Places,
        workspace: _C.Workspace,
        rail: Rail,
        timeout_s: float,
        first_timeout_s: float,
        failure: Callable[[], AllReduceError | None] = lambda: None,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._places = places
        self._workspace = workspace
        self._rail = rail
        self._timeout_s = timeout_s
        self._first_timeout_s = max(timeout_s, first_timeout_s)
        self._failure = failure
        self._beat_s = min(_LONGEST_BEAT_S, timeout_s / 4)
        self._signs = {peer: _Sign(heard_s=time.monotonic()) for peer in places.rail if peer != places.rank}
        self._answered_s = time.monotonic()
        self._pending_since: float | None = None
        self._last_ended = self._captured_at = -1
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self.error: PeerTimeoutError | None = None
        # Neither the thread nor the end of the process keeps alive what nobody uses any more, and what it holds.
        self._thread = threading.Thread(
            target=_tell_and_listen,
            args=(weakref.ref(self), store, self._key(places.rank), self._beat_s, self._stop, self._wake),
            name="llm-allreduce-hosts",
            daemon=True,
        )
        self._end = functools.partial(_end, self._thread, self._stop, self._wake, 2 * self._beat_s)
        self._thread.start()
        # A thread that the end of the interpreter meets inside of a store ends the process by SIGABRT.
        atexit.register(self._end)

    # -- what others ask -----------------------------------------------------------------------------------------------

    @property
    def limit_s(self) -> float:
        """How long the exchange that is under way, or comes next, may last: before the first, ranks may compile."""
        ended = self._workspace.exchanges()[1]
        return self._first_timeout_s if ended in (0, self._captured_at) else self._timeout_s

    def note_capture(self) -> None:
        """A graph is captured: before its first exchange, too, ranks may be busy with other things."""
        self._captured_at = self._workspace.exchanges()[1]

    def look(self) -> None:
        """Find out whether an exchange takes too long, and end it then: now and then."""
        begun, ended = self._workspace.exchanges()
        now = time.monotonic()
        if begun == ended:
            self._pending_since = None
            return
        if self._pending_since is None or ended != self._last_ended:
            self._pending_since, self._last_ended = now, ended
        waited_s = now - self._pending_since
        limit_s = self.limit_s
        if any(sign.state != "open" or now - sign.heard_s > self._timeout_s for sign in self._signs.values()):
            limit_s = min(limit_s, self._timeout_s)
        if any(sign.state != "open" for sign in self._signs.values()):
            limit_s = min(limit_s, 2 * self._beat_s)  # it will never come
        if waited_s > limit_s:
            self.fail(waited_s)

    def raise_error(self) -> None:
        """Raise what has broken the exchange, if anything has.

        Raises:
            PeerTimeoutError: as it says.
        """
        self.look()
        if self.error is not None:
            raise self.error

    def failed(self, began_s: float, reason: str) -> PeerTimeoutError:
        """The error for an exchange that has failed by itself, for ``reason``; waits a moment for who is behind it.

        ``began_s``: when it began, by the monotonic clock.
        """
        deadline = time.monotonic() + (_BEATS_OF_SILENCE + 2) * self._beat_s
        while self.error is None and time.monotonic() < deadline and not self._known(time.monotonic()):
            time.sleep(self._beat_s / 10)
        return self.fail(time.monotonic() - began_s, reason)

    def fail(self, waited_s: float, reason: str = "") -> PeerTimeoutError:
        """End the exchange, and what waits for it; the error that says for whom."""
        with self._lock:
            if self.error is None:
                self.error = self._error(waited_s, reason)
                # First of all, so that nothing sums what an exchange that was let go has brought.
                self._workspace.fail_exchange(waited_s)
                self._rail.abort()
                self._wake.set()
            return self.error

    def leave(self) -> None:
        """An exchange is left before its end, whatever the reason: nobody can go on, here and elsewhere."""
        with self._lock:
            self._workspace.fail_exchange(0.0)
            self._rail.abort()
            self._wake.set()

    def close(self) -> None:
        """Say so, and end the thread; a store that does not answer holds nobody. Idempotent."""
        atexit.unregister(self._end)
        self._end()

    # -- who is missing ------------------------------------------------------------------------------------------------

    def _known(self, now: float) -> tuple[int, str] | None:
        """The rank behind a failure, and what is known of it; None: of none is anything known."""
        signs = self._signs
        for peer, sign in signs.items():
            if sign.state != "open":
                what = "has closed its communicator" if sign.state == "closed" else f"could not go on: {sign.text}"
                return peer, f", which {what}"
        silence_s = _BEATS_OF_SILENCE * self._beat_s
        if now - self._answered_s > silence_s:
            return None  # nothing is heard of anybody
        silent = max(signs, key=lambda peer: now - signs[peer].heard_s)
        if (silent_s := now - signs[silent].heard_s) > silence_s:
            return silent, f", of which nothing was heard for {silent_s:.3g} s: has its process or host ended?"
        return None

    def _error(self, waited_s: float, reason: str) -> PeerTimeoutError:
        now = time.monotonic()
        places, begun = self._places, self._workspace.exchanges()[0]
        peer, known = next(iter(self._signs)), ""
        if (found := self._known(now)) is not None:
            peer, known = found
        elif (unanswered_s := now - self._answered_s) > _BEATS_OF_SILENCE * self._beat_s:
            known = f"; the store of the process group has not answered for {unanswered_s:.3g} s: has its host ended?"
        else:
            behind = [
                other for other, sign in self._signs.items() if (begun - sign.begun) % (1 << 32) in range(1, 1 << 31)
            ]
            if behind:
                peer, known = behind[0], ", which lives but has not come to this call"
        text = (
            f"rank {places.rank} on host {places.host} waited {waited_s:.3g} s for rank {peer} on host "
            f"{places.host_of(peer)} in the exchange between hosts{known}"
        )
        if reason:
            text += f" ({(reason.splitlines() or [''])[0][:_MOST_TEXT]})"
        return PeerTimeoutError(places.rank, peer, NAME, PHASE, waited_s, text=text)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/alive/{rank}"

    def _own_sign(self, *, is_last: bool) -> list[Any]:
        error = self.error or self._failure()
        state = "broken" if error is not None else "closed" if is_last else "open"
        return [self._workspace.exchanges()[0], state, str(error or "")[:_MOST_TEXT]]

    def _listen(self) -> None:
        for peer, sign in self._signs.items():
            if not self._store.check([self._key(peer)]):
                continue
            raw = self._store.get(self._key(peer))
            if raw == sign.raw:
                continue
            _beat, begun, state, text = json.loads(raw)
            self._signs[peer] = _Sign(begun, state, text, time.monotonic(), raw)
        self._answered_s = time.monotonic()


def _tell_and_listen(
    this: weakref.ref[HostWatch],
    store: Store,
    key: str,
    beat_s: float,
    stop: threading.Event,
    wake: threading.Event,
) -> None:
    """The thread of a watch: until that is closed, or nobody holds it any more, which other ranks hear as the same."""
    beat = 0
    sign: list[Any] = [0, "open", ""]
    while True:
        beat += 1
        is_last = stop.is_set()
        watch = this()
        try:
            if watch is not None:
                sign = watch._own_sign(is_last=is_last)  # noqa: SLF001
            elif sign[1] == "open":
                sign[1] = "closed"
            is_last = is_last or watch is None
            store.set(key, json.dumps([beat, *sign]))
            if watch is not None and not is_last:
                watch._listen()  # noqa: SLF001
        except Exception:  # noqa: BLE001, S110  (a store that is gone; what that means, the next exchange shows)
            pass
        if is_last:
            return
        watch = None
        wake.wait(beat_s)
        wake.clear()


def _end(thread: threading.Thread, stop: threading.Event, wake: threading.Event, wait_s: float) -> None:
    stop.set()
    wake.set()
    thread.join(wait_s)
