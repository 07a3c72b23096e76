"""Settings as text: YAML and JSON, of which only what settings need is taken.

Both formats let a key be given twice, YAML also builds objects from tags, and from a few hundred bytes of aliases
gigabytes. Whatever a file holds, reading it takes bounded time and memory, and what is wrong is said in words.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from llm_allreduce_plugin.base.files import read_text
from llm_allreduce_plugin.base.validation import shown
from llm_allreduce_plugin.errors import ConfigError, UnreadableFileError
from llm_allreduce_plugin.settings.values import shorter, unique

MOST_DEPTH = 16
MOST_VALUES = 10_000
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Null, booleans as YAML 1.1 has them, decimal and hexadecimal numbers; everything else is text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own name)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        """A mapping with keys that are text and given once."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != f"{_TAG}str":
                message = f"line {line}: a key must be text; in quotes it is"
                raise ValueError(message)
            if key.value in lines:
                message = f"key {shown(key.value)} is given twice, in lines {lines[key.value]} and {line}"
                raise ValueError(message)
            lines[key.value] = line
        return super().construct_mapping(node, deep)


for _name, _pattern, _first in (
    ("bool", r"(?i:yes|no|true|false|on|off)", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?i:inf)|\.(?i:nan)",
        "-+0123456789.",
    ),
    ("null", r"~|(?i:null)|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})\\Z"), list(_first))


def _check_events(text: str) -> None:
    """Refuse what settings have no use for before anything is built from it.

    Raises:
        ValueError: saying what, and in which line.
        yaml.YAMLError: it is not YAML.
    """
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        fault = None
        if isinstance(event, yaml.AliasEvent):
            fault = f"alias *{shorter(str(event.anchor), 80)}: aliases are not supported; write the value out"
        elif (tag := getattr(event, "tag", None)) is not None:
            fault = f"tag {shorter(str(tag), 80)}: tags are not supported"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            fault = f"nested more than {MOST_DEPTH} levels deep"
        if count > MOST_VALUES:
            fault = f"more than {MOST_VALUES} values"
        if fault is not None:
            message = f"line {event.start_mark.line + 1}: {fault}" if event.start_mark else fault
            raise ValueError(message)


def from_yaml(text: str) -> object:
    """What YAML text holds.

    Raises:
        ValueError: it is not YAML of the kind that settings are written in.
    """
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def from_json(text: str) -> object:
    """What JSON text holds.

    Raises:
        ValueError: it is not JSON, gives a key twice, or is nested too deeply.
    """
    deep = f"nested more than {MOST_DEPTH} levels deep"
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(deep) from None
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [value for part in inner for value in part]
    if level:
        raise ValueError(deep)
    return value


_FORMATS = {".json": from_json, ".yaml": from_yaml, ".yml": from_yaml}


def read_settings(path: Path, named_by: str) -> dict[str, Any]:
    """The mapping that a YAML or JSON file holds. ``named_by``: what named the file, for errors.

    Raises:
        ConfigError: it is no regular file of at most 1 MiB of UTF-8, or holds something else. The text names the file.
    """
    source = f"file {path}"
    parse = _FORMATS.get(path.suffix.lower())
    if parse is None:
        message = f"{source}: suffix {shown(path.suffix)}: must be one of {', '.join(_FORMATS)} ({named_by})"
        raise ConfigError(message)
    try:
        text = read_text(path)
    except UnreadableFileError as error:
        reason = error.reason if error.reason.startswith("cannot be read") else f"cannot be read: it {error.reason}"
        message = f"{source}: {reason} ({named_by})"
        raise ConfigError(message) from error
    try:
        values = parse(text)
    except ValueError as error:
        message = f"{source}: not valid {path.suffix.lstrip('.').upper()} for settings: {shorter(str(error), 1000)}"
        raise ConfigError(message) from error
    if not isinstance(values, dict):
        message = f"{source}: holds {shown(values)}: must be a mapping of settings"
        raise ConfigError(message)
    return values
