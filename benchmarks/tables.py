"""Tables of the documentation from records: what all of them are made with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KIB, MIB = 1 << 10, 1 << 20
MISSING = "-"


def record(name: str) -> dict[str, Any]:
    """A record, by its path under ``benchmarks`` without the suffix."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
    return found


def has_record(name: str) -> bool:
    """Whether it was measured."""
    return (ROOT / "benchmarks" / f"{name}.json").exists()


def size(number: int) -> str:
    """65536 as 64K."""
    return f"{number // MIB}M" if number >= MIB else f"{number // KIB}K"


def number(value: float) -> str:
    """To three digits, or all of them before the point."""
    digits = 2 - min(2, math.floor(math.log10(value)))
    return f"{value:.{min(digits, 2)}f}"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with these headings."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def times(name: str, *candidates: str) -> dict[int, float]:
    """Microseconds in a graph by bytes, of the fastest of the candidates."""
    found: dict[int, float] = {}
    for row in record(name)["rows"]:
        if row["candidate"] in candidates and row["graph_us"] is not None:
            found[row["bytes"]] = min(row["graph_us"], found.get(row["bytes"], row["graph_us"]))
    return found


def fastest(labelled: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[int, float]]:
    """Microseconds by bytes, of the fastest row of each label."""
    curves: dict[str, dict[int, float]] = {}
    for label, row in labelled:
        curve = curves.setdefault(label, {})
        curve[row["bytes"]] = min(row["us"], curve.get(row["bytes"], row["us"]))
    return curves


def by_size(lines: dict[str, dict[int, float]], sizes: Iterable[int] | None = None) -> str:
    """A line to each curve, a column to each size."""
    columns = sorted(sizes or {bytes_ for curve in lines.values() for bytes_ in curve})
    rows = [
        [label, *(number(curve[column]) if column in curve else MISSING for column in columns)]
        for label, curve in lines.items()
    ]
    return markdown(["us", *map(size, columns)], rows)
