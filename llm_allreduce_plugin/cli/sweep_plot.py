"""A sweep of decisions, drawn: what runs at which size, and in how many blocks."""

from __future__ import annotations

from pathlib import Path

from llm_allreduce_plugin.bench.palette import color_of
from llm_allreduce_plugin.bench.plot import new_figure, save, short_size
from llm_allreduce_plugin.selection.sweep import SizeRange


def draw(ranges: list[SizeRange], title: str, path: Path) -> None:
    """Write a picture whose format the suffix of ``path`` says (png, svg, pdf).

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: matplotlib does not know the suffix.
    """
    figure = new_figure(4.2)
    bands, blocks = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    names = list(dict.fromkeys(found.name for found in ranges))
    for found in ranges:
        row, width = names.index(found.name), found.last_bytes - found.first_bytes
        color = color_of(found.name, names)
        bands.barh(row, max(width, 1), left=found.first_bytes, height=0.6, color=color)
        most = max((launch.lanes for launch in found.launches), default=0)
        least = min((launch.lanes for launch in found.launches), default=0)
        blocks.fill_between([found.first_bytes, found.last_bytes], least, most, color=color, alpha=0.6)
    bands.set_yticks(range(len(names)), names)
    bands.invert_yaxis()
    blocks.set_ylabel("blocks, least to most")
    blocks.set_xlabel("bytes per rank")
    blocks.set_xscale("log", base=2)
    blocks.xaxis.set_major_formatter(short_size)
    for axes in (bands, blocks):
        axes.grid(visible=True, axis="x", alpha=0.25)
    figure.suptitle(title)
    save(figure, path)
