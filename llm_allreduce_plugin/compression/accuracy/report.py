"""The accuracy report as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_allreduce_plugin.bench.palette import color_of
from llm_allreduce_plugin.bench.plot import new_figure, save
from llm_allreduce_plugin.compression.accuracy.minilm import Effect
from llm_allreduce_plugin.compression.accuracy.synthetic import Error

EXACT = "exact"


def synthetic_table(errors: Sequence[Error]) -> str:
    """A line to each error."""
    head = f"{'format':>10} {'ranks':>5} {'compressed':>16} {'data':>12}"
    lines = [f"{head} {'relative L2':>12} {'cosine':>10} {'max error':>10}"]
    for e in errors:
        where = f"between {e.hosts} hosts" if e.hosts > 1 else "inside a host"
        numbers = f"{e.relative_l2:>12.4%} {e.cosine:>10.6f} {e.relative_max:>10.4%}"
        lines.append(f"{e.wire_format or EXACT:>10} {e.ranks:>5} {where:>16} {e.data:>12} {numbers}")
    return "\n".join(lines)


def model_table(effects: Sequence[Effect]) -> str:
    """A line to each effect."""
    names = f"{'mean cosine':>12} {'worst':>10} {'nearest kept':>13} {'5 nearest kept':>15} {'rank corr.':>11}"
    lines = [f"{'format':>10} {'ranks':>5} {names}"]
    for e in effects:
        kept = f"{e.nearest_kept:>13.1%} {e.five_kept:>15.1%} {e.rank_correlation:>11.5f}"
        lines.append(f"{e.wire_format or EXACT:>10} {e.ranks:>5} {e.mean_cosine:>12.6f} {e.least_cosine:>10.6f} {kept}")
    return "\n".join(lines)


def draw(errors: Sequence[Error], effects: Sequence[Effect], path: Path) -> None:
    """Errors over ranks for each format and kind of data; what becomes of the embeddings.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    figure = new_figure(5.2)
    left, right = figure.subplots(1, 2)
    styles = {"normal": "-", "heavy-tailed": "--", "outliers": ":"}
    formats = list(dict.fromkeys(error.wire_format for error in errors))
    for name in formats:
        color = color_of(name or EXACT, [str(known) for known in formats])
        for data, style in styles.items():
            points = [(e.ranks, e.relative_l2) for e in errors if (e.wire_format, e.data, e.hosts) == (name, data, 1)]
            if points:
                left.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=color,
                          label=f"{name or EXACT}, {data}")  # fmt: skip
        seen = [(e.ranks, 1 - e.mean_cosine) for e in effects if e.wire_format == name]
        if seen:
            right.plot(*zip(*seen, strict=True), marker="o", markersize=4, color=color)
    left.set_ylabel("relative L2 error of one all-reduce")
    right.set_ylabel("1 - mean cosine of MiniLM's embeddings")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
        axes.set_xticks(sorted({error.ranks for error in errors}))
        axes.grid(visible=True, which="both", alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path)
