"""``--allreduce-strategy`` and ``--allreduce-config`` on SGLang's command line, and as keys of its ``--config`` file.

SGLang's arguments have no place for a plugin's. What is given is checked where it stands, and written into environment
variables of the settings: schedulers are spawned, and inherit them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_allreduce_plugin.base.validation import shown
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.errors import ConfigError
from llm_allreduce_plugin.settings.documents import from_json, read_settings
from llm_allreduce_plugin.settings.environment import variable_of
from llm_allreduce_plugin.settings.faults import validated
from llm_allreduce_plugin.settings.values import path as as_path

STRATEGY = "--allreduce-strategy"
CONFIG = "--allreduce-config"
_FIELD = "allreduce_strategy"

# The strategy of this process's command line, and the flag that it came from.
_given: dict[str, AllReduceStrategy] = {}


def given_strategy() -> AllReduceStrategy | None:
    """The strategy of this process's command line, if it names one."""
    return next(iter(_given.values()), None)


def add_to(parser: argparse.ArgumentParser) -> None:
    """Let SGLang's parser know the flags."""
    _given.clear()
    group = parser.add_argument_group("all-reduce (llm_allreduce_plugin)")
    group.add_argument(
        STRATEGY,
        action=_Strategy,
        metavar="NAME",
        help=f"How all-reduces of the tensor-parallel group run: {', '.join(AllReduceStrategy)}.",
    )
    group.add_argument(
        CONFIG,
        action=_Config,
        metavar="JSON|FILE",
        help="Further settings of the all-reduce: a JSON object, or a YAML or JSON file.",
    )


# SGLang's reader of --config files takes only actions that store.
class _Strategy(argparse._StoreAction):  # noqa: SLF001
    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        try:
            strategy = AllReduceStrategy.parse(values)
        except ValueError as error:
            raise argparse.ArgumentError(self, f"{shown(values)}: {error}") from None
        _take_strategy(self, STRATEGY, strategy)
        _carry(_FIELD, strategy)
        setattr(namespace, self.dest, str(strategy))


class _Config(argparse._StoreAction):  # noqa: SLF001
    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        try:
            settings = settings_in(str(values))
        except ConfigError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        found = settings.model_dump(mode="json", exclude_unset=True)
        if _FIELD in found:
            _take_strategy(self, CONFIG, settings.allreduce_strategy)
        for field, value in found.items():
            _carry(field, value)
        setattr(namespace, self.dest, values)


def settings_in(given: str) -> AllReduceConfig:
    """The settings of ``--allreduce-config``, in which only what is given is set.

    Raises:
        ConfigError: it is neither a JSON object of settings nor a file with some.
    """
    if not given.lstrip().startswith("{"):
        try:
            path = Path(str(as_path(given)))
        except ValueError as error:
            message = f"{shown(given)}: {error}"
            raise ConfigError(message) from None
        return validated(f"file {path}", AllReduceConfig, read_settings(path, CONFIG))
    try:
        found = from_json(given)
    except ValueError as error:
        message = f"not valid JSON: {error}"
        raise ConfigError(message) from None
    assert isinstance(found, dict)  # it begins with a brace
    return validated(CONFIG, AllReduceConfig, found)


def _take_strategy(action: argparse.Action, flag: str, strategy: AllReduceStrategy) -> None:
    """Note a strategy. The same flag again counts instead of the earlier one: a file's keys come before the flags."""
    for other, earlier in _given.items():
        if other != flag and earlier is not strategy:
            message = f"strategy {strategy} contradicts {earlier} of {other}: give one of them"
            raise argparse.ArgumentError(action, message)
    _given[flag] = strategy


def _carry(field: str, value: object) -> None:
    """Write a setting into its environment variable, over whatever spelling of that is there. None: it is not given."""
    variable = variable_of(field)
    for spelled in [name for name in os.environ if name.upper() == variable]:
        del os.environ[spelled]
    if isinstance(value, bool):
        os.environ[variable] = str(value).lower()
    elif isinstance(value, dict):
        os.environ[variable] = json.dumps(value)
    elif value is not None:
        os.environ[variable] = str(value)
