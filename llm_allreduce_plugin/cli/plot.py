"""llm-allreduce plot: the picture of a measurement that is already on record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_allreduce_plugin.base.validation import printable
from llm_allreduce_plugin.cli import options, outputs
from llm_allreduce_plugin.errors import UnreadableFileError
from llm_allreduce_plugin.measure.record import Row, read

EPILOG = options.epilog(
    "llm-allreduce bench --json bench.json; llm-allreduce plot bench.json --out bench.png",
    "llm-allreduce plot benchmarks/h200/bench_tp4.json --out bench.svg --with MINLATENCY,NCCL",
)


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
    outputs.check_picture("--out", out)
    rows, ranks, where = _rows_of(files)
    names = list(dict.fromkeys(row.candidate for row in rows))
    if only is not None:
        wanted = [name.strip().lower() for name in only.split(",")]
        if unknown := [name for name in wanted if name not in {known.lower() for known in names}]:
            message = f"--with {unknown[0]}: must be one of {', '.join(names)}"
            raise typer.BadParameter(message)
        rows = [row for row in rows if row.candidate.lower() in wanted]
    if all(row.eager_us is None and row.graph_us is None for row in rows):
        message = (
            f"{', '.join(map(str, files))}: nothing was measured of {', '.join(only.split(',') if only else names)}"
        )
        raise typer.BadParameter(printable(message))

    from llm_allreduce_plugin.bench.plot import draw
    from llm_allreduce_plugin.bench.worker import Measurement

    with outputs.writing("--out", out):
        draw([Measurement(**row.model_dump()) for row in rows], ranks, where, out)


def _rows_of(files: list[Path]) -> tuple[list[Row], int, str]:
    """All rows, of how many ranks they are, and where the last ones were measured.

    Raises:
        typer.BadParameter: a file cannot be read, is something else, or is of another number of ranks.
    """
    rows: list[Row] = []
    ranks, where = 0, ""
    for path in files:
        try:
            record = read(path)
        except UnreadableFileError as error:
            raise typer.BadParameter(printable(str(error))) from None
        if ranks and record.world_size != ranks:
            message = f"{path}: is of {record.world_size} ranks, the files before of {ranks}"
            raise typer.BadParameter(printable(message))
        ranks, where = record.world_size, record.where
        known = {row.candidate for row in rows}
        for row in record.rows:
            name = f"{row.candidate} {record.options.wire_format}" if row.candidate in known else row.candidate
            rows.append(row.model_copy(update={"candidate": name}))
    return rows, ranks, where
