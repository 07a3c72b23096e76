"""llm-allreduce report: what the ranks of running and ended servers have left in ``report_dir``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from llm_allreduce_plugin.base.validation import PlainText, printable
from llm_allreduce_plugin.cli import options, outputs
from llm_allreduce_plugin.errors import UnreadableFileError
from llm_allreduce_plugin.runtime.reports import Report, Text, found_in, read_as
from llm_allreduce_plugin.topology.links import Transport

EPILOG = options.epilog(
    "llm-allreduce report reports",
    "llm-allreduce report reports --plot calls.png",
    "llm-allreduce report reports --json",
)


class Shown(Report):
    """A report with what stands in it for people."""

    host: PlainText = ""
    pid: int | None = Field(default=None, ge=0)
    transport: PlainText = ""
    allreduce_strategy: PlainText = ""
    sizes: Text = ""
    note: Text = ""


def _state(report: Shown, modified: float) -> str:
    """Whether its rank has ended, and how old it is."""
    age = max(0.0, time.time() - modified)
    written = f"{age:.0f} s" if age < 120 else f"{age / 60:.0f} min" if age < 7200 else f"{age / 3600:.0f} h"  # noqa: PLR2004
    return f"{'ended' if report.closed else 'open'}, written {written} ago"


def _calls(report: Shown) -> str:
    told = [f"{name} {calls}" for name, calls in report.calls.items()]
    told += [f"{name} {calls} in graphs" for name, calls in report.captured.items()]
    return ", ".join(told) or report.note or "no calls"


def _differ(reports: Sequence[Shown]) -> bool:
    """Whether ranks of one group counted differently: one was behind the others when it was last heard of."""
    return len({json.dumps([report.calls, report.captured], sort_keys=True) for report in reports}) > 1


def _print_group(group: str, found: Sequence[tuple[float, Shown]]) -> None:
    reports = [report for _, report in found]
    first = reports[0]
    known = first.transport in set(Transport)
    memory = Transport(first.transport).in_words if known else f"{first.transport or 'unknown'} memory"
    typer.echo(f"group {group or '(without a name)'}: {memory}, ", nl=False)
    typer.echo(f"allreduce_strategy {first.allreduce_strategy or 'unknown'}")
    if first.sizes:
        typer.echo(f"  {printable(first.sizes)}")
    for modified, report in found:
        where = f" on {report.host}" if report.host else ""
        typer.echo(f"  rank {report.rank}{where} ({_state(report, modified)}): {printable(_calls(report))}")
    fallbacks = {
        (one.requested, one.strategy, one.reason): max(
            other.calls
            for report in reports
            for other in report.fallback_calls
            if (other.requested, other.strategy, other.reason) == (one.requested, one.strategy, one.reason)
        )
        for report in reports
        for one in report.fallback_calls
    }
    for (requested, strategy, reason), calls in fallbacks.items():
        typer.echo(f"  instead of {requested}: {strategy}, {calls} calls: {printable(reason)}")
    if not fallbacks:
        typer.echo("  no fallbacks")
    if _differ(reports):
        typer.echo("  ranks counted differently: look at the one with fewer calls, if nothing runs any more")


def report(
    *,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The report_dir of one or several servers.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw calls by strategy: png, svg or pdf.")
    ] = None,
) -> None:
    """Print what ranks report: calls by strategy, fallbacks with their reasons, group by group.

    The youngest reports come first. Those of servers that still run are about a quarter of a second old.
    """
    outputs.check_picture("--plot", plot)
    groups: dict[str, list[tuple[float, Shown]]] = {}
    for modified, path in _paths(folder):
        try:
            found = read_as(Shown, path)
        except UnreadableFileError as error:
            typer.echo(f"left out: {printable(str(error))}", err=True)
            continue
        groups.setdefault(found.group, []).append((modified, found))
    if not groups:
        message = f"{folder}: no reports there: give the folder that report_dir names, as the server sees it"
        raise typer.BadParameter(printable(message))
    for members in groups.values():
        members.sort(key=lambda one: one[1].rank)
    if as_json:
        documents = [found.model_dump(exclude_defaults=True) for members in groups.values() for _, found in members]
        typer.echo(json.dumps(documents, indent=1))
    else:
        for number, (group, members) in enumerate(groups.items()):
            typer.echo("", nl=number > 0)
            _print_group(group, members)
    if plot is not None:
        from llm_allreduce_plugin.bench.report_plot import draw

        calls = {group: [found for _, found in members] for group, members in groups.items()}
        with outputs.writing("--plot", plot):
            draw(calls, plot)


def _paths(folder: Path) -> list[tuple[float, Path]]:
    """Files of reports with their times, the youngest first.

    Raises:
        typer.BadParameter: it is no folder, or cannot be read.
    """
    try:
        if not folder.is_dir():
            message = f"{folder}: is not a folder: give the one that report_dir names"
            raise typer.BadParameter(printable(message))
        return found_in(folder)
    except OSError as error:
        message = f"{folder}: cannot be read: {error.strerror}"
        raise typer.BadParameter(printable(message)) from None
