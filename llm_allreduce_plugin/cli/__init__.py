"""llm-allreduce: look at a node and at what the all-reduce will do on it."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.cli import accuracy, bench, breakeven, topo, tune

app = typer.Typer(
    name="llm-allreduce",
    help="The all-reduce under tensor-parallel LLM serving: what this node can run, and why.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _version(value: bool) -> None:  # noqa: FBT001
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Holds --version."""


app.command(name="topo")(topo.topo)
app.command(name="bench")(bench.bench)
app.command(name="accuracy")(accuracy.accuracy)
app.command(name="breakeven")(breakeven.breakeven)
app.command(name="tune")(tune.tune)


def main() -> None:
    """Entry point of the console script."""
    app()
