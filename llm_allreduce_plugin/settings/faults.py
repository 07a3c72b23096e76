"""What is said about a wrong setting: source, field, value, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llm_allreduce_plugin.base.validation import shown
from llm_allreduce_plugin.errors import ConfigError
from llm_allreduce_plugin.settings.values import shorter

_Model = TypeVar("_Model", bound=BaseModel)
_MOST_LINES = 20


def unknown_key(key: str, known: Iterable[str], close: str | None = None) -> str:
    """What to say about a key that is none of ``known``. ``close``: the one that is meant; default: looked for."""
    names = list(known)
    if close is None:
        close = next(iter(difflib.get_close_matches(key, names, n=1)), None)
    hint = f"; did you mean {close}?" if close else ""
    return f"unknown key; allowed are {', '.join(names)}{hint}"


def _model_of(annotation: object) -> type[BaseModel] | None:
    """The settings that a field holds, where it holds some."""
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _line(source: str, model: type[BaseModel], fault: Any, label: Mapping[str, str]) -> str:  # noqa: ANN401
    """What is said about one of pydantic's faults."""
    path = [part if isinstance(part, str) else str(part) for part in fault["loc"]]
    name = ".".join(shorter(part, 80) for part in [label.get(path[0], path[0]), *path[1:]]) if path else "?"
    value = shown(fault["input"])
    if fault["type"] == "invalid_key":
        return f"{source}: key {name}: must be text"
    fields, meaning = model.model_fields, None
    for part in path:
        field = fields.get(part)
        if field is None:
            break
        meaning = field.description or meaning
        inner = _model_of(field.annotation)
        fields = inner.model_fields if inner is not None else {}
    if fault["type"] == "extra_forbidden":
        return f"{source}: {name}={value}: {unknown_key(path[-1], fields)}"
    allowed = fault["msg"].removeprefix("Value error, ")
    allowed = allowed[:1].lower() + allowed[1:]
    return f"{source}: {name}={value}: {allowed}{f' ({meaning})' if meaning else ''}"


def described(
    source: str, model: type[BaseModel], error: ValidationError, label: Mapping[str, str] | None = None
) -> ConfigError:
    """The error with a line for each fault. ``label``: how this source calls fields, where not by their names."""
    faults = error.errors(include_url=False, include_context=False)
    lines = [_line(source, model, fault, label or {}) for fault in faults[:_MOST_LINES]]
    if len(faults) > _MOST_LINES:
        lines.append(f"{source}: and {len(faults) - _MOST_LINES} more")
    return ConfigError("\n".join(lines))


def validated(
    source: str, model: type[_Model], values: Mapping[Any, Any], label: Mapping[str, str] | None = None
) -> _Model:
    """``values`` as settings.

    Raises:
        ConfigError: a line for each fault with source, field, value and what is allowed.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise described(source, model, error, label) from None
    except RecursionError:
        message = f"{source}: nested too deeply, or holds itself"
        raise ConfigError(message) from None
