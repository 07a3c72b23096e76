"""Passes of several engines that are there at once, in turns, and what their times say of each other."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TURN_S = 300  # for a turn of one's own: others may still be starting
PAUSE_S = 0.002


def _failed(path: Path) -> Path:
    return path.with_name(f"{path.name}.failed")


def begin(path: Path) -> None:
    """No turn is over yet."""
    path.write_text("0")


def give_up(path: Path, who: str) -> None:
    """``who`` takes no turn any more, so that nobody waits for it."""
    _failed(path).write_text(who)


class Turns:
    """Passes of several processes in turns.

    Args:
        path: a file that all of them see, which has the number of turns that are over.
        place: whose turn comes when that number, modulo ``count``, is this.
        count: of processes.
    """

    def __init__(self, path: Path, place: int, count: int) -> None:
        self._path, self._place, self._count = path, place, count

    @contextlib.contextmanager
    def next(self) -> Iterator[None]:
        """Wait for a turn, and end it.

        Raises:
            TimeoutError: it does not come.
            RuntimeError: another process has given up.
        """
        over = self._wait(lambda over: over % self._count == self._place)
        yield
        self._path.write_text(str(over + 1))

    def all_over(self, passes: int) -> None:
        """Wait until each has had so many: an engine that ends takes time of those that do not.

        Raises:
            TimeoutError: they have not.
            RuntimeError: another process has given up.
        """
        self._wait(lambda over: over >= passes * self._count)

    def _wait(self, come: Callable[[int], bool]) -> int:
        until = time.monotonic() + TURN_S
        while not (text := self._path.read_text()) or not come(int(text)):  # empty while it is written
            if _failed(self._path).exists():
                message = f"{_failed(self._path).read_text()} takes no turn any more"
                raise RuntimeError(message)
            if time.monotonic() > until:
                message = (
                    f"no turn within {TURN_S} s: {text} are over, and this is number {self._place} of {self._count}"
                )
                raise TimeoutError(message)
            time.sleep(PAUSE_S)
        return int(text)


def options(path: Path, place: int, count: int) -> tuple[str, ...]:
    """Those by which an engine's process finds its turns."""
    return ("--turns", str(path), "--place", str(place), "--count", str(count))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The same, for an engine to read."""
    parser.add_argument("--turns", type=Path, help="the file of :class:`Turns`")
    for name in ("--place", "--count"):
        parser.add_argument(name, type=int, default=0)


def turns_of(arguments: argparse.Namespace) -> Turns | None:
    """An engine's turns; None: it is alone."""
    return Turns(arguments.turns, arguments.place, arguments.count) if arguments.turns else None


def next_of(turns: Turns | None) -> contextlib.AbstractContextManager[None]:
    """The next turn; an engine that is alone has it at once."""
    return turns.next() if turns else contextlib.nullcontext()


def ratios(
    rows: Sequence[dict[str, Any]], batches: Sequence[int], stock_variant: str, what: str = "passes"
) -> dict[str, dict[str, float | None]]:
    """Of every variant, the median over all passes of its time over the stock engine's in the pass beside it.

    ``what``: the times, ``passes`` of the engine's steps or ``gpu_passes``. None: no two passes have both.
    """
    stock = {row["start"]: row for row in rows if row["variant"] == stock_variant}
    found: dict[str, dict[str, float | None]] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows if row["variant"] != stock_variant):
        beside = [(row, stock[row["start"]]) for row in rows if row["variant"] == variant and row["start"] in stock]
        if not beside:
            continue
        found[variant] = {}
        for size in batches:
            name = f"{what}_batch_{size}"
            of_passes = [
                ours / theirs
                for row, other in beside
                for ours, theirs in zip(row[name], other[name], strict=True)
                if ours is not None and theirs is not None
            ]
            found[variant][str(size)] = round(statistics.median(of_passes), 4) if of_passes else None
    return found
