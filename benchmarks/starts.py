"""Starts of engines, a variant each: one after another, or all at once, taking their passes in turns."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import turns

Answer = dict[str, Any] | Exception


def start_all(
    variants: Sequence[str], together: Path | None, run: Callable[[str, tuple[str, ...]], dict[str, Any]]
) -> Iterator[tuple[str, Answer]]:
    """One start of every variant: its name, and what it measured or why it failed.

    Args:
        variants: in the order in which they start, or take turns.
        together: the file of their turns (``benchmarks.turns``) where all are there at once; None: one after another.
        run: one start to its end. It is given a variant and the options of its turns, none where it is alone.
    """
    count = len(variants)
    if together is not None:
        turns.begin(together)

    def one(place: int) -> Answer:
        options = turns.options(together, place, count) if together else ()
        try:
            return run(variants[place], options)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if together is not None:
                turns.give_up(together, variants[place])
            return error

    with ThreadPoolExecutor(count if together else 1) as pool:
        try:
            yield from zip(variants, pool.map(one, range(count)), strict=True)
        except BaseException:
            if together is not None:
                turns.give_up(together, "the benchmark")  # or this would wait for the engines' last turns
            raise
