"""Calls by strategy, as ranks have reported them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llm_allreduce_plugin.bench.palette import color_of
from llm_allreduce_plugin.bench.plot import new_figure, save
from llm_allreduce_plugin.runtime.reports import Report

_LONGEST = 40  # characters of a group's name


def draw(groups: Mapping[str, Sequence[Report]], path: Path) -> None:
    """Write a picture with a bar for each rank, whose format the suffix of ``path`` says (png, svg, pdf).

    Raises:
        RuntimeError: matplotlib is not installed.
        OSError: it cannot be written.
    """
    ranks = [(f"rank {report.rank}, {group[:_LONGEST]}", report) for group, of in groups.items() for report in of]
    names = list(dict.fromkeys(name for _, report in ranks for name in [*report.calls, *report.captured]))
    figure = new_figure(1.6 + 0.4 * len(ranks))
    axes = figure.subplots()
    before = [0] * len(ranks)
    for name in names:
        counts = [report.calls.get(name, 0) + report.captured.get(name, 0) for _, report in ranks]
        normed = "/" if "norm" in name else None
        of = name.split(",", maxsplit=1)[0]
        label = name.replace("$", r"\$")  # whatever a file says, no formula
        axes.barh(range(len(ranks)), counts, left=before, label=label, color=color_of(of), hatch=normed, ec="white")
        before = [start + count for start, count in zip(before, counts, strict=True)]
    axes.set_yticks(range(len(ranks)), [label for label, _ in ranks])
    axes.invert_yaxis()
    axes.set_xlabel("calls, and calls captured into graphs")
    if names:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)
