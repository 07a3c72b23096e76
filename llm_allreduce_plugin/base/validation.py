"""What every document from outside has in common: text that a terminal can be shown, and faults that name fields."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, StringConstraints, ValidationError

from llm_allreduce_plugin.base.files import MOST_BYTES, parse_json, read_text
from llm_allreduce_plugin.errors import UnreadableFileError

_Model = TypeVar("_Model", bound=BaseModel)

MOST_CHARACTERS: Final = 1000
MOST_FAULTS: Final = 5  # that an error names
_MOST_BITS_SHOWN = 128


class _Short(reprlib.Repr):
    """``repr`` that is short whatever it is given: documents may be large, deep, or contain themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxlevel = 4

    def repr_int(self, value: int, level: int) -> str:
        # repr() of thousands of digits is an error.
        bits = value.bit_length()
        return f"<number of {bits} bits>" if bits > _MOST_BITS_SHOWN else super().repr_int(value, level)

    def repr_instance(self, value: object, level: int) -> str:
        return self.repr_str(str(value), level) if isinstance(value, Path) else super().repr_instance(value, level)


shown = _Short().repr


def printable(text: str) -> str:
    """``text`` with everything escaped that a terminal would obey or hide: control and format characters."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def _plain(text: str) -> str:
    if not text.isprintable():
        message = "must be one line of printable characters"
        raise ValueError(message)
    return text


# Names and sentences of a document. They reach terminals and logs.
PlainText = Annotated[str, StringConstraints(max_length=MOST_CHARACTERS), AfterValidator(_plain)]


def faults(error: ValidationError, most: int = MOST_FAULTS) -> list[str]:
    """Field, reason and value of what is wrong, the first ``most`` of them, in printable characters alone."""
    found = error.errors(include_url=False)
    texts = []
    for fault in found[:most]:
        reason = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "string_too_long":
            reason = f"must have at most {fault['ctx']['max_length']} characters"
        elif fault["type"] != "json_invalid" and isinstance(fault["input"], str | int | float | None):
            reason += f", not {shown(fault['input'])}"
        # A fault of several fields together begins with its own field.
        field = ".".join(map(str, fault["loc"])) or ("" if fault["type"] == "value_error" else "document")
        text = printable(f"{field}: {reason}" if field else reason)
        texts.append(text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ...")
    return [*texts, f"and {len(found) - most} more"] if len(found) > most else texts


def read_document(
    path: Path,
    model: type[_Model],
    what: str,
    *,
    check: Callable[[Any], None] = lambda _: None,
    most_bytes: int = MOST_BYTES,
) -> _Model:
    """A JSON file of a known form, read as strictly as JSON allows: ``"1"``, ``1.0`` and ``true`` are not 1.

    Args:
        path: of the file.
        model: its form.
        what: that files of this form are: ``"record of ..."``.
        check: is given what the file holds before it is held against the form, and may raise: of other versions.
        most_bytes: that it may have.

    Raises:
        UnreadableFileError: it cannot be read or has another form. The text names the file, the fields and the values.
    """
    text = read_text(path, most_bytes)
    check(parse_json(path, text))
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise UnreadableFileError(path, f"is no {what}: {'; '.join(faults(error))}") from None
