"""Latency and bus bandwidth against message size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from llm_allreduce_plugin.bench.palette import color_of
from llm_allreduce_plugin.bench.table import bandwidths
from llm_allreduce_plugin.bench.worker import Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "--plot needs matplotlib: pip install matplotlib"


def short_size(size: float, _position: float) -> str:
    """4096 as 4K."""
    for unit, name in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size >= unit:
            return f"{size / unit:g}{name}"
    return f"{size:g}"


def new_figure(height: float) -> Figure:
    """An empty picture as wide as all of this package's.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError(MISSING) from None
    return Figure(figsize=(11, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a picture whose format the suffix of ``path`` says (png, svg, pdf). Makes missing folders.

    Raises:
        OSError: it cannot be written.
        ValueError: matplotlib does not know the suffix.
    """
    drawn = io.BytesIO()  # first, so that no half of a picture is ever written
    figure.savefig(drawn, format=path.suffix.lower().removeprefix(".") or None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn.getvalue())


def draw(rows: list[Measurement], world_size: int, title: str, path: Path) -> None:
    """Write a picture whose format the suffix of ``path`` says (png, svg, pdf).

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    figure = new_figure(4.6)
    latency, bandwidth = figure.subplots(1, 2)
    names = list(dict.fromkeys(row.candidate for row in rows))
    for name in names:
        color = color_of(name, names)
        points = [(row.bytes, row.time_us) for row in rows if row.candidate == name]
        measured = [(size, time) for size, time in points if time is not None]
        if not measured:
            continue
        sizes = [size for size, _ in measured]
        latency.plot(sizes, [time for _, time in measured], marker="o", markersize=3, label=name, color=color)
        rates = [bandwidths(size, time, world_size)[1] for size, time in measured]
        bandwidth.plot(sizes, rates, marker="o", markersize=3, color=color)
    for axes, unit in ((latency, "microseconds per call"), (bandwidth, "bus bandwidth, GB/s")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(short_size)
        axes.set_yscale("log")
        axes.set_xlabel("bytes per rank")
        axes.set_ylabel(unit)
        axes.grid(visible=True, which="both", alpha=0.25)
    latency.legend()
    figure.suptitle(title)
    save(figure, path)
