"""The ranks that `llm-allreduce tune` measures: its own, or those that torchrun has started on any hosts."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_allreduce_plugin.measure.ranks import RankContext, Ranks
    from llm_allreduce_plugin.measure.torchrun import Place


def place_of(tp: str | None) -> Place:
    """Of a rank that torchrun has started.

    Raises:
        typer.BadParameter: it has not.
    """
    from llm_allreduce_plugin.measure.torchrun import Place

    if tp is not None:
        message = f"--tp {tp}: with --torchrun all ranks are one group; leave it out"
        raise typer.BadParameter(message)
    try:
        return Place.of(command="tune")
    except ValueError as error:
        message = f"--torchrun: {error}"
        raise typer.BadParameter(message) from None


def follow_first(place: Place, *, on_gpu: bool) -> NoReturn:
    """Do what the first rank says, to its end.

    Raises:
        typer.Exit: in any case; with code 1 where a rank has failed, which the first one tells.
    """
    from llm_allreduce_plugin.measure.ranks import RankFailedError
    from llm_allreduce_plugin.measure.torchrun import follow

    try:
        with _in_group(place, on_gpu=on_gpu) as context:
            follow(context)
    except RankFailedError:
        raise typer.Exit(1) from None
    raise typer.Exit(0)


@contextlib.contextmanager
def _in_group(place: Place, *, on_gpu: bool) -> Iterator[RankContext]:
    """The group that torchrun has started. What was opened to be measured is closed in it, whatever has happened."""
    from llm_allreduce_plugin.base.cleanup import quietly
    from llm_allreduce_plugin.bench import worker
    from llm_allreduce_plugin.measure.torchrun import joined

    with joined(place, on_gpu=on_gpu) as context:
        try:
            yield context
        finally:
            quietly(lambda: worker.close_all(context), "close what was measured")


@contextlib.contextmanager
def _joined(place: Place, *, on_gpu: bool) -> Iterator[Ranks]:
    """All ranks that torchrun has started."""
    from llm_allreduce_plugin.measure.ranks import RankFailedError
    from llm_allreduce_plugin.measure.torchrun import Lead

    with _in_group(place, on_gpu=on_gpu) as context:
        lead = Lead(context)
        try:
            yield lead
        except RankFailedError:  # which the others have heard of
            raise
        except BaseException:
            lead.end()
            raise
        lead.end()


@contextlib.contextmanager
def _started(ranks: int, device: str) -> Iterator[Ranks]:
    """Ranks of this command's own."""
    from llm_allreduce_plugin.measure.ranks import RankPool

    with RankPool(ranks, device) as pool:
        yield pool


def ranks_of(place: Place | None, number: int, device: str) -> contextlib.AbstractContextManager[Ranks]:
    """Those that torchrun has started, of which this is the first, or ``number`` of this command's own."""
    return _started(number, device) if place is None else _joined(place, on_gpu=device == "cuda")
