"""What a setting may hold and how it is written. The same in every source: file, environment, engine, command line."""

from __future__ import annotations

import enum
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from llm_allreduce_plugin.base.validation import shown

MOST_BYTES_OF_A_MESSAGE = 1 << 40
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MOST_DIGITS = 20  # more than any bound has; int() of thousands of digits is an error of its own


def parse_size(text: str) -> int:
    """The bytes that ``text`` names: ``512``, or with a unit, ``64K``, ``64Ki`` and ``64KiB`` all being 65,536.

    As in nccl-tests, units are binary, here also M, G and T. ``KB``, ``MB``, ``GB`` and ``TB``, which some read as
    powers of 1000 and some as powers of 1024, are refused.

    Raises:
        ValueError: it is no size; the text says what is one.
    """
    match = re.fullmatch(r"([0-9]+)\s*([KMGT]?)(i?B?)", text.strip(), re.IGNORECASE)
    if match is None or (match[3].lower().startswith("i") and not match[2]):
        message = "must be a whole number of bytes, like 512, 64K, 64M or 64MiB"
        raise ValueError(message)
    number, unit, rest = match[1], match[2].upper(), match[3].lower()
    if unit and rest == "b":
        message = (
            f"must be a whole number of bytes; {unit}B may mean two sizes: write {unit}iB (or {unit}) for powers of "
            "1024, or all digits"
        )
        raise ValueError(message)
    if len(number.lstrip("0")) > _MOST_DIGITS:
        message = f"must be a whole number of bytes with at most {_MOST_DIGITS} digits"
        raise ValueError(message)
    return int(number) * _UNITS[unit]


def size(value: object) -> object:
    """A number of bytes from text; what is no text is left to the field's own type."""
    return parse_size(value) if isinstance(value, str) else value


def lower_case(value: object) -> object:
    """Text without spaces around it, in lower case."""
    return value.strip().lower() if isinstance(value, str) else value


def switch(value: object) -> object:
    """Text in lower case; YAML reads on and off as booleans."""
    return lower_case({True: "on", False: "off"}[value] if isinstance(value, bool) else value)


def path(value: object) -> object:
    """A path from text: ``~`` and ``~user`` are home folders; otherwise relative to the process's current folder.

    Raises:
        ValueError: it is no path, is empty, or names an unknown user.
    """
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        message = "must be a path"
        raise ValueError(message)  # noqa: TRY004  (pydantic turns ValueError into a validation error)
    text = os.fspath(value)
    if not isinstance(text, str) or not _is_text(text):
        message = "must be a path in UTF-8"
        raise ValueError(message)
    if not text.strip():
        message = "must be a path, and not empty"
        raise ValueError(message)
    if "\0" in text:
        message = "must be a path, without null bytes"
        raise ValueError(message)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        message = f"must be a path; {text.split('/')[0]} is no home folder of this system"
        raise ValueError(message) from None


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8. The environment can hold other bytes, which Python maps to surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping from the pairs of a JSON object.

    Raises:
        ValueError: a key is given twice, of which JSON would take the last without a word.
    """
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            message = f"key {shown(key)} is given twice"
            raise ValueError(message)
        mapping[key] = value
    return mapping


def mapping(value: object) -> object:
    """A mapping from text, as environment variables have it.

    Raises:
        ValueError: it is neither a mapping nor one as JSON.
    """
    message = "must be a mapping of settings, as JSON in the environment"
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else shorter(str(error))
            raise ValueError(f"{message}: {why}") from None  # noqa: TRY003
    if isinstance(value, BaseModel):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(message)  # noqa: TRY004  (pydantic turns ValueError into a validation error)
    return dict(value)


def shorter(text: str, most: int = 300) -> str:
    """``text`` in one piece that fits a log line."""
    return text if len(text) <= most else f"{text[:most]} ..."


def _members(annotation: object) -> list[object]:
    """The types in an annotation such as ``tuple[int, ...] | None``."""
    inner = get_args(annotation)
    return [annotation, *(member for part in inner for member in _members(part))]


def _takes_switch(annotation: object) -> bool:
    """Whether it is a setting that is on or off, so that a boolean means something."""
    kinds = _members(annotation)
    return any(
        kind is bool or (isinstance(kind, type) and issubclass(kind, enum.StrEnum) and {"on", "off"} <= set(kind))
        for kind in kinds
    )


def no_boolean(value: object) -> object:
    """``value`` unless it is a boolean, which Python takes for 0 or 1.

    Raises:
        ValueError: it is one.
    """
    if isinstance(value, bool):
        message = "must not be a boolean (YAML reads yes, no, on and off as booleans; in quotes they are text)"
        raise ValueError(message)  # noqa: TRY004  (pydantic turns ValueError into a validation error)
    return value


class Settings(BaseModel):
    """A group of settings. Frozen; unknown keys are errors; a boolean is no number and a number no boolean."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _kinds_are_told_apart(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if not _takes_switch(annotation):
            return no_boolean(value)
        if bool in _members(annotation) and isinstance(value, int | float) and not isinstance(value, bool):
            message = "must be true or false (text may also be on, off, yes, no, 1 or 0)"
            raise ValueError(message)
        return value
