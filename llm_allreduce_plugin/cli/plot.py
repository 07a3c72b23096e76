"""llm-allreduce plot: the picture of a measurement that is already on record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_allreduce_plugin.cli import options

if TYPE_CHECKING:
    from llm_allreduce_plugin.bench.worker import Measurement

EPILOG = options.epilog(
    "llm-allreduce bench --json bench.json; llm-allreduce plot bench.json --out bench.png",
    "llm-allreduce plot benchmarks/h200/bench_tp4.json --out bench.svg --with MINLATENCY,NCCL",
)


def read_record(path: Path) -> tuple[dict[str, Any], list[Measurement]]:
    """What ``bench --json`` wrote: the record and its rows.

    Raises:
        typer.BadParameter: it cannot be read, or is something else.
    """
    from llm_allreduce_plugin.bench.worker import Measurement

    try:
        record = json.loads(path.read_text())
        return record, [Measurement(**row) for row in record["rows"] if record["world_size"]]
    except OSError as error:
        message = f"{path}: cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError):
        message = f"{path}: is no record of `llm-allreduce bench --json`"
    raise typer.BadParameter(message)


def plot(
    *,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Records of `bench --json`, of as many ranks.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The picture: png, svg or pdf.")],
    only: Annotated[
        str | None, typer.Option("--with", metavar="NAMES", help="Only these, separated by commas.")
    ] = None,
) -> None:
    """Draw latency and bus bandwidth against message size from recorded measurements.

    Where several files have the same candidate, the later one's is named after its wire format.
    """
    from llm_allreduce_plugin.bench.plot import draw

    rows: list[Measurement] = []
    ranks, where = 0, ""
    for path in files:
        record, measured = read_record(path)
        if ranks and record["world_size"] != ranks:
            message = f"{path}: is of {record['world_size']} ranks, the files before of {ranks}"
            raise typer.BadParameter(message)
        ranks, where = record["world_size"], record.get("where", "")
        wire = record.get("options", {}).get("wire_format", "")
        known = {row.candidate for row in rows}
        rows += [
            dataclasses.replace(row, candidate=f"{row.candidate} {wire}") if row.candidate in known else row
            for row in measured
        ]
    names = list(dict.fromkeys(row.candidate for row in rows))
    if only is not None:
        wanted = [name.strip().lower() for name in only.split(",")]
        if unknown := [name for name in wanted if name not in {known.lower() for known in names}]:
            message = f"--with {unknown[0]}: must be one of {', '.join(names)}"
            raise typer.BadParameter(message)
        rows = [row for row in rows if row.candidate.lower() in wanted]
    try:
        draw(rows, ranks, where, out)
    except (RuntimeError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
