"""What `llm-allreduce bench` measures: all-reduces alone, or (`--fused`) with residual and norm behind them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import typer

from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES
from llm_allreduce_plugin.quantization import QuantKind, check_hidden

if TYPE_CHECKING:
    from llm_allreduce_plugin.bench.candidates import OurSettings
    from llm_allreduce_plugin.bench.worker import Options


@dataclasses.dataclass(frozen=True)
class Norm:
    """The norm behind an all-reduce.

    Attributes:
        hidden: elements of a row.
        quant: how it is quantized; None: it is not.
    """

    hidden: int
    quant: QuantKind | None

    def counts(self, sizes: list[int], dtype: str) -> list[int]:
        """Elements of messages of whole rows, of at most these sizes in bytes.

        Raises:
            typer.BadParameter: such rows cannot be normed, or none is as small.
        """
        try:
            check_hidden(self.hidden, self.quant)
        except ValueError as error:
            message = f"--hidden {self.hidden}: {error}"
            raise typer.BadParameter(message) from None
        row = self.hidden * ELEMENT_BYTES[dtype]
        rows = sorted({size // row for size in sizes} - {0})
        if not rows:
            message = f"--maxbytes {sizes[-1]}: less than a row of {self.hidden} {dtype}, {row} bytes"
            raise typer.BadParameter(message)
        return [number * self.hidden for number in rows]


def norm_of(*, fused: bool, hidden: int | None, quant: QuantKind | None) -> Norm | None:
    """The norm that is asked for; None: none is.

    Raises:
        typer.BadParameter: there is a hidden size, and no norm.
    """
    if fused:
        return Norm(8192 if hidden is None else hidden, quant)
    if hidden is not None:
        message = f"--hidden {hidden}: give --fused, too: only then messages have rows"
        raise typer.BadParameter(message)
    return None


@dataclasses.dataclass(frozen=True)
class Subject:
    """What runs on the ranks.

    Attributes:
        norm: behind the all-reduces; None: there is none.
        options: how it is measured.
        settings: of this package's candidates.
    """

    norm: Norm | None
    options: Options
    settings: OurSettings


def subject(norm: Norm | None, settings: OurSettings, **options: Any) -> Subject:  # noqa: ANN401
    """What is measured, with the options of ``worker.Options``."""
    from llm_allreduce_plugin.bench.worker import Options

    if norm is None:
        return Subject(None, Options(**options), settings)
    return Subject(norm, Options(**options, hidden=norm.hidden, quant=norm.quant), settings)


def candidates(norm: Norm | None, device_type: str) -> tuple[str, ...]:
    """The names of all that can be measured."""
    from llm_allreduce_plugin.bench import candidates, norm_candidates

    return candidates.names(device_type) if norm is None else norm_candidates.names(device_type)
