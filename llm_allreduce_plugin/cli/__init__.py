"""llm-allreduce: look at a node and at what the all-reduce will do on it."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.base import processes

try:
    from llm_allreduce_plugin.cli import accuracy, bench, breakeven, check, explain, plot, topo, tune
except ImportError as error:
    # What `check` would say, but for that it needs the library itself.
    message = (
        f"FAIL  package  llm_allreduce_plugin {__version__} does not load: {error}\n      -> install it again with pip"
    )
    raise SystemExit(message) from None

app = typer.Typer(
    name="llm-allreduce",
    help="The all-reduce under tensor-parallel LLM serving: what this node can run, and why.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # paragraphs of docstrings are joined
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


# In the order in which a newcomer needs them.
app.command(name="check", epilog=check.EPILOG)(check.check)
app.command(name="topo", epilog=topo.EPILOG)(topo.topo)
app.command(name="explain", epilog=explain.EPILOG)(explain.explain)
app.command(name="bench", epilog=bench.EPILOG)(bench.bench)
app.command(name="tune", epilog=tune.EPILOG)(tune.tune)
app.command(name="accuracy", epilog=accuracy.EPILOG)(accuracy.accuracy)
app.command(name="breakeven", epilog=breakeven.EPILOG)(breakeven.breakeven)
app.command(name="plot", epilog=plot.EPILOG)(plot.plot)


def main() -> None:
    """Entry point of the console script."""
    processes.end_on_signals(processes.command_name)
    app()
