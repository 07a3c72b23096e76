"""What commands have in common: how sizes, types and settings are written, and what a shell may complete.

The same thing has the same name everywhere: ``--tp`` the number of ranks, ``--dtype`` the element type, ``--topology``
a recorded node, ``--strategy``, ``--transport`` and ``--wire-format`` settings of the plugin, ``--cpu`` CPU ranks,
``--plot`` a picture. ``--json`` prints what a command has to say as JSON; with commands that measure it takes a file,
into which the numbers go with the environment they were measured in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES
from llm_allreduce_plugin.base.validation import shown
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, TransportChoice, WireFormat, load_config
from llm_allreduce_plugin.errors import ConfigError
from llm_allreduce_plugin.quantization import QuantKind
from llm_allreduce_plugin.settings.values import MOST_BYTES_OF_A_MESSAGE, parse_size

*_FIRST, _LAST = WireFormat
WIRE_FORMAT_HELP = f"LOWPRECISION: {', '.join(_FIRST)} or {_LAST}."
FUSED_HELP = "With residual and RMSNorm behind it, in one kernel where that can be."
QUANT_HELP = f"With --fused, what the norm is quantized to: {', '.join(QuantKind)}; default: it is not."
# nccl-tests' and the usual short names beside torch's.
DTYPES = {
    "float": "float32",
    "float32": "float32",
    "fp32": "float32",
    "half": "float16",
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}


def parse_bytes(option: str, text: str) -> int:
    """``"4K"`` is 4096, as in nccl-tests and as in settings. ``option``: whose text it is, for errors.

    Raises:
        typer.BadParameter: it is not a size, or larger than any message.
    """
    try:
        number = parse_size(text)
    except ValueError as error:
        message = f"{option} {shown(text)}: {error}"
        raise typer.BadParameter(message) from None
    if 0 < number <= MOST_BYTES_OF_A_MESSAGE:
        return number
    message = f"{option} {shown(text)}: must be a positive number of bytes up to 1T, like 512, 4K, 1M or 1G"
    raise typer.BadParameter(message)


def check_holds_element(option: str, text: str, number: int, dtype: str) -> None:
    """Check that a message of ``number`` bytes has an element. ``option``, ``text``: what it is from, for the error.

    Raises:
        typer.BadParameter: it has none.
    """
    if number < ELEMENT_BYTES[dtype]:
        message = f"{option} {text}: less than an element of {dtype}, {ELEMENT_BYTES[dtype]} bytes"
        raise typer.BadParameter(message)


def parse_dtype(text: str, others: Iterable[str] = ()) -> str:
    """The element type as torch spells it; ``others`` are taken as they are.

    Raises:
        typer.BadParameter: it is none of the known names.
    """
    name = text.strip().lower()
    if name in others:
        return name
    if name not in DTYPES:
        message = f"--dtype {text}: must be one of {', '.join([*DTYPES, *others])}"
        raise typer.BadParameter(message)
    return DTYPES[name]


def parse_quant(text: str | None, *, fused: bool) -> QuantKind | None:
    """How a norm is quantized. ``fused``: there is a norm.

    Raises:
        typer.BadParameter: it is none of the known kinds, or there is no norm.
    """
    if text is None:
        return None
    if not fused:
        message = f"--quant {text}: only norms are quantized: give --fused, too"
        raise typer.BadParameter(message)
    try:
        return QuantKind(text.strip().lower())
    except ValueError:
        message = f"--quant {text}: must be one of {', '.join(QuantKind)}"
        raise typer.BadParameter(message) from None


# Bounds of numbers on the command line, far beyond what anybody has.
MOST_RANKS = 1024
MOST_TIMES = 1_000_000  # that something is measured
MOST_IN_A_ROW = 1 << 31  # elements, or rows


def parse_ranks(text: str) -> int | None:
    """A number of ranks; None when it is no such number."""
    word = text.strip()
    return int(word) if word.isascii() and word.isdecimal() and len(word) <= len(str(MOST_RANKS)) else None


def configured(**options: object) -> AllReduceConfig:
    """The settings of file and environment, with those options over them that were given.

    Raises:
        typer.BadParameter: a setting is wrong.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return load_config(given, engine_name="command line")
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


def _completing(words: Iterable[str]) -> Callable[[str], list[str]]:
    known = list(words)

    def complete(incomplete: str) -> list[str]:
        # In the case that is being typed: shells keep only words that begin with just that.
        words = [word.lower() for word in known] if incomplete.islower() else known
        return [word for word in words if word.startswith(incomplete)]

    return complete


complete_strategy = _completing(AllReduceStrategy)
complete_transport = _completing(TransportChoice)
complete_wire_format = _completing(WireFormat)
complete_dtype = _completing(DTYPES)
complete_quant = _completing(QuantKind)


def complete_topology(incomplete: str) -> list[str]:
    """JSON files and folders that begin like this."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") or not incomplete else typed.parent
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    words = [f"{entry}/" if entry.is_dir() else str(entry) for entry in entries if _may_be_topology(entry)]
    return [word for word in words if word.startswith(incomplete)]


def _may_be_topology(entry: Path) -> bool:
    return entry.suffix == ".json" or (entry.is_dir() and not entry.name.startswith("."))


def epilog(*lines: str) -> str:
    """Examples under a command's help, in a list, because typer joins single lines."""
    return "\n".join(["Examples:", "", *(f"- {line}" for line in lines)])


_Command = TypeVar("_Command", bound=Callable[..., None])


def brief(command: _Command) -> _Command:
    """Let the help of ``command`` fit a screen: defaults in the line of their option; ranges are told by errors."""
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                _shorten(info, get_args(hint)[0], parameter.default)
    command.__annotations__ = hints
    return command


def _shorten(option: OptionInfo, kind: object, default: object) -> None:
    if option.metavar is None and kind is not bool:
        option.metavar = "N" if int in (kind, *get_args(kind)) else "WORD"
    if option.show_default and option.help and default not in (None, False, "", inspect.Parameter.empty):
        option.help = f"{option.help.removesuffix('.')}; default: {default}."
    option.show_default = False
