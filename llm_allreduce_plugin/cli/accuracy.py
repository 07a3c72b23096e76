"""llm-allreduce accuracy: what each wire format of LOWPRECISION costs, on made data and in a real model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from llm_allreduce_plugin.cli import options, outputs
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.wire import FORMATS_BETWEEN_HOSTS

EPILOG = options.epilog(
    "llm-allreduce accuracy",
    "llm-allreduce accuracy --wire-format fp8 --tp 2,4 --no-model",
    "llm-allreduce accuracy --hosts 2 --tp 4,8 --no-model",
    "llm-allreduce accuracy --json accuracy.json --plot accuracy.png",
)


def _formats(text: str) -> list[WireFormat]:
    try:
        return [WireFormat(name.strip().lower()) for name in text.split(",")]
    except ValueError:
        message = f"--wire-format {text}: must be some of {', '.join(WireFormat)}, separated by commas"
        raise typer.BadParameter(message) from None


FEWEST, MOST = 2, 8  # ranks that LOWPRECISION serves


def _ranks(text: str) -> list[int]:
    found = [options.parse_ranks(part) for part in text.split(",")]
    ranks = [size for size in found if size is not None and FEWEST <= size <= MOST]
    if len(ranks) < len(found):
        message = f"--tp {text}: must be numbers from {FEWEST} to {MOST}, separated by commas"
        raise typer.BadParameter(message)
    return ranks


def accuracy(
    *,
    formats: Annotated[
        str, typer.Option("--wire-format", "--formats", help="Wire formats, separated by commas.")
    ] = ",".join(WireFormat),
    ranks: Annotated[str, typer.Option("--tp", "--ranks", help="Numbers of ranks, separated by commas.")] = "2,4,8",
    hosts: Annotated[
        int, typer.Option("--hosts", min=1, max=8, help="Also ranks on so many hosts, compressed between them alone.")
    ] = 1,
    model: Annotated[bool, typer.Option("--model/--no-model", help="Also the sentence-embedding model.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers here.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw them (png, svg, pdf).")] = None,
) -> None:
    """Measure the error of compressed all-reduces: of one on made data, and of all of a model's layers together.

    Computed with the torch oracle, whose bits are those of the kernels, so no GPU is needed. The model is
    all-MiniLM-L6-v2, split over as many ranks as divide its 12 heads.
    """
    outputs.check_file("--json", json_file)
    outputs.check_picture("--plot", plot)
    wires, sizes = _formats(formats), _ranks(ranks)
    between = [wire for wire in wires if wire in FORMATS_BETWEEN_HOSTS]
    spread = [size for size in sizes if hosts > 1 and size % hosts == 0]
    if hosts > 1 and not spread:
        message = f"--hosts {hosts}: none of --tp {ranks} has as many ranks on each host"
        raise typer.BadParameter(message)

    from llm_allreduce_plugin.compression.accuracy import minilm, report, synthetic

    errors = []
    typer.echo(f"# one all-reduce of bf16 [{synthetic.TOKENS}, {synthetic.HIDDEN}] against fp64")
    for data in synthetic.DATA:
        errors += [synthetic.measure(wire, size, data) for wire in (None, *wires) for size in sizes]
        errors += [synthetic.measure(wire, size, data, hosts=hosts) for wire in (None, *between) for size in spread]
    typer.echo(report.synthetic_table(errors))
    effects: list[minilm.Effect] = []
    if model:
        try:
            loaded = minilm.MiniLm()
        except minilm.MissingModelError as missing:
            typer.echo(f"# {missing}")
        else:
            split = [size for size in sizes if loaded.heads % size == 0]
            typer.echo("#\n# sentence embeddings of all-MiniLM-L6-v2, two all-reduces in each of 6 layers")
            if split != sizes:
                left_out = ", ".join(str(size) for size in sizes if size not in split)
                typer.echo(f"# not over {left_out} ranks: the model has {loaded.heads} heads")
            effects = minilm.measure(loaded, wires, split)
            typer.echo(report.model_table(effects))
    if json_file is not None:
        from llm_allreduce_plugin.measure.environment import write_record

        rows = [dataclasses.asdict(error) for error in errors] + [dataclasses.asdict(effect) for effect in effects]
        with outputs.writing("--json", json_file):
            write_record(json_file, rows, tokens=synthetic.TOKENS, hidden=synthetic.HIDDEN)
    if plot is not None:
        with outputs.writing("--plot", plot):
            report.draw(errors, effects, plot)
