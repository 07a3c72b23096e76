"""Environment variables: which are settings, which are somebody else's, and which are settings misspelled.

Others use the prefix too. Kubernetes and Docker give every container variables about each service, whose names begin
with the service's: of a service called ``llm-allreduce`` they begin like settings. Images and charts add a version or a
home folder. None of these may keep a server from starting, and a misspelled setting must.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from llm_allreduce_plugin.base.validation import shown
from llm_allreduce_plugin.errors import ConfigError
from llm_allreduce_plugin.settings.faults import unknown_key
from llm_allreduce_plugin.settings.values import path

ENV_PREFIX = "LLM_ALLREDUCE_"
CONFIG_FILE_VARIABLE = "LLM_ALLREDUCE_CONFIG"
# With the prefix, but not settings: what only the build and the scripts read.
_NOT_SETTINGS = {"LLM_ALLREDUCE_CUDA_ARCHS", "LLM_ALLREDUCE_NVCC", "LLM_ALLREDUCE_PYTHON"}
# How much of a name must be a setting's (difflib's ratio) for a misspelling, and the shortest part of one that tells.
_CLOSE = 0.7
_TELLING_LETTERS = 6

_PROTOCOL = "(?:TCP|UDP|SCTP)"
_URL = re.compile(r"(?:tcp|udp|sctp)://\S+:[0-9]+", re.IGNORECASE)
# What a service's variable ends in after the service's name, and what it then holds.
_LINKS = (
    (re.compile(r"_SERVICE_HOST"), "address"),
    (re.compile(r"_SERVICE_PORT(?:_[A-Z0-9_]+)?"), "number"),
    (re.compile(r"_PORT"), "url"),
    (re.compile(rf"_PORT_[0-9]+_{_PROTOCOL}"), "url"),
    (re.compile(rf"_PORT_[0-9]+_{_PROTOCOL}_ADDR"), "address"),
    (re.compile(rf"_PORT_[0-9]+_{_PROTOCOL}_PORT(?:_START|_END)?"), "number"),
    (re.compile(rf"_PORT_[0-9]+_{_PROTOCOL}_PROTO"), "protocol"),
)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


_HOLDS: dict[str, Callable[[str], bool]] = {
    "address": _is_address,
    "number": lambda text: re.fullmatch("[0-9]{1,5}", text) is not None,
    "url": lambda text: _URL.fullmatch(text) is not None,
    "protocol": lambda text: re.fullmatch(_PROTOCOL, text, re.IGNORECASE) is not None,
}


def is_service_link(variable: str, value: str) -> bool:
    """Whether Kubernetes or Docker set it to tell where a service is, by the shape of name and value."""
    rest = variable.removeprefix(ENV_PREFIX.rstrip("_"))
    for start in (match.start() for match in re.finditer("_", rest)):
        for ending, kind in _LINKS:
            if ending.fullmatch(rest, start) and _HOLDS[kind](value):
                return True
    return False


def variable_of(field: str) -> str:
    """The environment variable of a field; the strategy's is ``LLM_ALLREDUCE_STRATEGY``."""
    return ENV_PREFIX + field.removeprefix("allreduce_").upper()


def settings_file(named: str) -> Path:
    """The file that ``LLM_ALLREDUCE_CONFIG`` names.

    Raises:
        ConfigError: it is no path.
    """
    try:
        return Path(str(path(named)))
    except ValueError as error:
        message = f"environment: {CONFIG_FILE_VARIABLE}={shown(named)}: {error}"
        raise ConfigError(message) from None


def _squeezed(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper())


def _contains(whole: str, part: str) -> bool:
    return len(part) >= _TELLING_LETTERS and f"_{part}_" in f"_{whole}_"


def _meant(rest: str, names: Mapping[str, str]) -> str | None:
    """The variable that was meant, where what follows the prefix resembles one of ``names`` (name: its variable)."""
    by_letters = {_squeezed(name): variable for name, variable in names.items()}
    close = difflib.get_close_matches(_squeezed(rest), list(by_letters), n=1, cutoff=_CLOSE)
    if close:
        return by_letters[close[0]]
    return next((variable for name, variable in names.items() if _contains(rest, name) or _contains(name, rest)), None)


@dataclasses.dataclass(frozen=True)
class Found:
    """What the environment says.

    Attributes:
        values: the text of each setting that has one, by field.
        file: the text of ``LLM_ALLREDUCE_CONFIG``; None: not set.
        unknown: variables with the prefix that are nobody's known, and resemble no setting.
    """

    values: dict[str, str]
    file: str | None
    unknown: tuple[str, ...]


def read(fields: Sequence[str], nested: Mapping[str, Iterable[str]], environment: Mapping[str, str]) -> Found:
    """What variables with the prefix say. Their names count in any case; empty ones are unset.

    Args:
        fields: the settings.
        nested: for settings that are mappings, the names in them, which have no variables of their own.
        environment: to look at.

    Raises:
        ConfigError: a variable is a misspelled setting, or two spellings of one variable differ.
    """
    variables = {variable_of(field): field for field in fields} | {CONFIG_FILE_VARIABLE: CONFIG_FILE_VARIABLE}
    names = {field.upper(): variable_of(field) for field in fields}
    names |= {variable.removeprefix(ENV_PREFIX): variable for variable in variables}
    names |= {name.upper(): variable_of(field) for field, inner in nested.items() for name in inner}
    known: dict[str, tuple[str, str]] = {}
    unknown = []
    for spelled, value in _with_prefix(environment):
        variable = spelled.upper()
        if variable in _NOT_SETTINGS or (variable not in variables and is_service_link(variable, value)):
            continue
        if variable not in variables:
            rest = variable.removeprefix(ENV_PREFIX)
            meant = _meant(re.sub("^LLM_?ALL_?REDUCE_?", "", rest), names)
            if meant is not None:
                message = f"environment: {spelled}={shown(value)}: {unknown_key(spelled, sorted(variables), meant)}"
                raise ConfigError(message)
            if variable.startswith(ENV_PREFIX):
                unknown.append(spelled)
        elif value:
            first, text = known.setdefault(variable, (spelled, value))
            if text != value:
                message = (
                    f"environment: {first}={shown(text)} and {spelled}={shown(value)}: two spellings of one variable "
                    "with different values: give one of them"
                )
                raise ConfigError(message)
    values = {variables[variable]: value for variable, (_, value) in known.items()}
    file = values.pop(CONFIG_FILE_VARIABLE, None)
    return Found(values, file, tuple(sorted(unknown)))


def _with_prefix(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variables that begin like ours, ``LLM_ALL_REDUCE_...`` too."""
    for name, value in sorted(environment.items()):
        if re.match("LLM_?ALL_?REDUCE_", name, re.IGNORECASE):
            yield name, value
