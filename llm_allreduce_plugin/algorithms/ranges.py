"""Which strategy is the fastest for which sizes: the types, and how numbers for one world size follow from others'."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

BYTE_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))

# What a sum with a norm behind it may run as.
ONE_KERNEL, TWO_KERNELS = "fused", "then-norm"


@dataclasses.dataclass(frozen=True)
class Range:
    """Messages up to ``max_bytes`` per rank (None: all larger ones) are fastest with ``strategy``."""

    max_bytes: int | None
    # "ONESHOT" or "TWOSHOT"; of registered outputs also "UB"; with a norm behind the sum, ONE_KERNEL or TWO_KERNELS.
    strategy: str


@dataclasses.dataclass(frozen=True)
class Table:
    """The ranges of one world size, in rising order, and where they come from."""

    ranges: tuple[Range, ...]
    source: str

    def range_of(self, payload_bytes: int) -> tuple[int, Range]:
        """The range of a message, with the size above which it begins."""
        below = 0
        for found in self.ranges:
            if found.max_bytes is None or payload_bytes <= found.max_bytes:
                return below, found
            below = found.max_bytes
        raise AssertionError(self)  # the last range has no limit

    def place_of(self, payload_bytes: int) -> str:
        """``8 KiB are within 64 KiB and more than 4 KiB``: the range of a message, in words."""
        below, found = self.range_of(payload_bytes)
        if found.max_bytes is not None:
            where = f"within {bytes_in_words(found.max_bytes)}"
            where += f" and more than {bytes_in_words(below)}" if below else ""
        else:
            where = f"more than {bytes_in_words(below)}" if below else "like all sizes"
        return f"{bytes_in_words(payload_bytes)} are {where}"


@dataclasses.dataclass(frozen=True)
class TunedRanges:
    """What was measured for elements of one size.

    Attributes:
        element_bytes: of an element.
        ranges: which strategy is the fastest.
        fused: with residual and norm behind the sum, one kernel or two; empty: that was not measured.
        registered: which strategy is the fastest where results may go into registered outputs; empty: that was not
            measured.
    """

    element_bytes: int
    ranges: tuple[Range, ...]
    fused: tuple[Range, ...] = ()
    registered: tuple[Range, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a profile says about one group.

    Attributes:
        source: which profile, and when it was measured.
        ranges: by size of an element; at least one.
    """

    source: str
    ranges: tuple[TunedRanges, ...]

    def _of(self, element_bytes: int) -> TunedRanges:
        """For elements of this size, or of the one that was measured: what counts is bytes, additions hardly do."""
        return next((found for found in self.ranges if found.element_bytes == element_bytes), self.ranges[0])

    def table(self, element_bytes: int) -> Table:
        """For elements of this size, or of the one that was measured."""
        return Table(self._of(element_bytes).ranges, self.source)

    def registered_table(self, element_bytes: int) -> Table | None:
        """The same where results may go into registered outputs; None: that was not measured."""
        ranges = self._of(element_bytes).registered
        return Table(ranges, self.source) if ranges else None

    def fused_table(self, element_bytes: int) -> Table | None:
        """One kernel or two for a sum of such elements with a norm behind it; None: that was not measured."""
        ranges = next((found.fused for found in self.ranges if found.element_bytes == element_bytes), ())
        return Table(ranges, self.source) if ranges else None


def changeover(max_bytes: int, source: str) -> Table:
    """One-shot up to a size, two-shot above."""
    return Table((Range(max_bytes, "ONESHOT"), Range(None, "TWOSHOT")), source)


def between(anchors: Mapping[int, int], world_size: int) -> int:
    """Bytes for a world size from those of others, in rising order: on a line between the logarithms of two.

    Beyond the last one inverse to the square of the world size: what one-shot sends and what it reads both grow with
    it. Below the first one, the first's.
    """
    sizes = list(anchors)
    if world_size <= sizes[0]:
        return anchors[sizes[0]]
    if world_size >= sizes[-1]:
        return anchors[sizes[-1]] * sizes[-1] * sizes[-1] // (world_size * world_size)
    above = next(i for i, size in enumerate(sizes) if size >= world_size)
    low, high = sizes[above - 1], sizes[above]
    share = math.log(world_size / low) / math.log(high / low)
    return round(math.pow(anchors[low], 1 - share) * math.pow(anchors[high], share))


def bytes_in_words(count: int) -> str:
    """``192 KiB``, to four digits."""
    for unit, size in BYTE_UNITS:
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"
