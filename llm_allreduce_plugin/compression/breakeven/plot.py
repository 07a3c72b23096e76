"""Time against link bandwidth, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llm_allreduce_plugin.bench.palette import EXACT, color_of
from llm_allreduce_plugin.bench.plot import new_figure, save
from llm_allreduce_plugin.compression.breakeven.model import LINKS, CodecSpeed, seconds
from llm_allreduce_plugin.config import WireFormat

POINTS = 60
LEAST, MOST = 5.0, 1000.0  # GB/s


def draw(
    payload_bytes: float, world_size: int, speeds: Mapping[WireFormat, CodecSpeed], title: str, path: Path
) -> None:
    """Write a picture whose format the suffix of ``path`` says (png, svg, pdf).

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    figure = new_figure(4.6)
    axes = figure.subplots()
    bandwidths = [LEAST * (MOST / LEAST) ** (i / (POINTS - 1)) for i in range(POINTS)]
    axes.plot(bandwidths, [seconds(payload_bytes, world_size, b) * 1e3 for b in bandwidths], label="exact", color=EXACT)
    for wire, speed in speeds.items():
        axes.plot(
            bandwidths, [seconds(payload_bytes, world_size, b, wire, speed) * 1e3 for b in bandwidths],
            label=wire, color=color_of(wire),
        )  # fmt: skip
    for link, bandwidth in LINKS.items():
        axes.axvline(bandwidth, linestyle=":", color="gray")
        axes.text(bandwidth, axes.get_ylim()[1], f" {link}", rotation=90, va="top", ha="right", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("link bandwidth, GB/s per direction")
    axes.set_ylabel(f"milliseconds for {payload_bytes / 2**20:g} MiB over {world_size} ranks")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    figure.suptitle(title)
    save(figure, path)
