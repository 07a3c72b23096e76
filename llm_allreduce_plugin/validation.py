"""What every document from outside has in common: text that a terminal can be shown, and faults that name fields."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, StringConstraints, ValidationError

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
