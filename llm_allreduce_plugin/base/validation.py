"""What every document from outside has in common: text that a terminal can be shown, and faults that name fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, TypeVar

from pydantic import AfterValidator, BaseModel, StringConstraints, ValidationError

from llm_allreduce_plugin.base.files import parse_json, read_text
from llm_allreduce_plugin.errors import UnreadableFileError

_Model = TypeVar("_Model", bound=BaseModel)

MOST_CHARACTERS: Final = 1000
MOST_FAULTS: Final = 5  # that an error names


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
    """Field and reason of what is wrong, the first ``most`` of them, without a character that is not printable."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    texts = []
    for fault in found[:most]:
        reason = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "string_too_long":
            reason = f"must have at most {MOST_CHARACTERS} characters"
        # A fault of several fields together begins with its own field.
        field = ".".join(map(str, fault["loc"])) or ("" if fault["type"] == "value_error" else "document")
        text = printable(f"{field}: {reason}" if field else reason)
        texts.append(text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ...")
    return [*texts, f"and {len(found) - most} more"] if len(found) > most else texts


def read_document(path: Path, model: type[_Model], what: str) -> _Model:
    """A JSON file of a known form, read as strictly as JSON allows: ``"1"``, ``1.0`` and ``true`` are not 1.

    Args:
        path: of the file.
        model: its form.
        what: that files of this form are: ``"record of ..."``.

    Raises:
        UnreadableFileError: it cannot be read or has another form. The text names the file and the fields.
    """
    text = read_text(path)
    parse_json(path, text)
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise UnreadableFileError(path, f"is no {what}: {'; '.join(faults(error))}") from None
