"""llm-allreduce: look at a node and at what the all-reduce will do on it."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.base import processes

try:
    from llm_allreduce_plugin.cli import (
        accuracy,
        bench,
        breakeven,
        check,
        demo,
        explain,
        options,
        plot,
        report,
        topo,
        tune,
    )
except ImportError as error:
    # What `check` would say, but for that it needs the library itself.
    message = (
        f"FAIL  package  llm_allreduce_plugin {__version__} does not load: {error}\n      -> reinstall it with pip"
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
for _name, _module in (
    ("check", check),
    ("demo", demo),
    ("topo", topo),
    ("explain", explain),
    ("report", report),
    ("bench", bench),
    ("tune", tune),
    ("accuracy", accuracy),
    ("breakeven", breakeven),
    ("plot", plot),
):
    app.command(name=_name, epilog=_module.EPILOG)(options.brief(getattr(_module, _name)))


def main() -> None:
    """Entry point of the console script."""
    processes.end_on_signals(processes.command_name)
    app()
