"""The plugin's settings inside an engine's own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import torch

from llm_allreduce_plugin.base.validation import shown
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, load_config
from llm_allreduce_plugin.errors import ConfigError

SECTION = "allreduce"
SHORTHAND = "allreduce_strategy"
# Where the plugin leaves its version, so that an engine's compile cache tells versions apart.
STAMP = "llm_allreduce_plugin"

# How much of a key must be one of ours (difflib's ratio, letters only) to be a misspelling of it.
_CLOSE = 0.85
# What people put around the name of a section, letters only.
_AROUND = "^v?llm|(?:config|settings|options|args|plugin)$"


def settings_of(given: object, source: str, section: str = SECTION) -> AllReduceConfig:
    """The settings that an engine's own configuration asks for, over file and environment.

    ``{"allreduce": {...}}`` takes every setting; ``{"allreduce_strategy": "ONESHOT"}`` alone is a shorthand. Keys that
    plainly mean this plugin and stand elsewhere are errors; other plugins' keys are left alone.

    Args:
        given: what the engine was given for plugins; anything but a mapping asks for nothing.
        source: where that stands, for errors: ``"vLLM additional_config"``.
        section: the key under which the settings stand there.

    Raises:
        ConfigError: naming source, field, value and what is allowed.
    """
    if not isinstance(given, Mapping):
        return load_config()
    for key, value in given.items():
        if isinstance(key, str) and (fault := _misplaced(key, value, section)) is not None:
            message = f"{source}: {shown(key)[1:-1]}={shown(value)}: {fault}"
            raise ConfigError(message)
    found = given.get(section, {})
    if not isinstance(found, Mapping):
        message = f"{source}: {section}={shown(found)}: must be a mapping such as {{'allreduce_strategy': 'ONESHOT'}}"
        raise ConfigError(message)
    values: dict[str, Any] = dict(found)
    if SHORTHAND in given:
        short = given[SHORTHAND]
        if SHORTHAND in values and not _is_same(values[SHORTHAND], short):
            message = (
                f"{source}: {SHORTHAND}={shown(short)} contradicts {section}.{SHORTHAND}={shown(values[SHORTHAND])}: "
                "give one of them"
            )
            raise ConfigError(message)
        values[SHORTHAND] = short
    return load_config(values, engine_name=source)


def device_obstacle(device: str) -> str | None:
    """Why nothing of this package runs on such a device, as torch calls it (``"cuda:1"``), or None."""
    if device.startswith("cuda") and torch.version.hip is not None:
        device = "rocm"  # which torch calls cuda
    if device.split(":", maxsplit=1)[0] in ("cuda", "cpu"):
        return None
    return f"there are kernels for CUDA GPUs and CPU ranks, and the device is {device}"


def _letters(key: str) -> str:
    return re.sub("[^a-z0-9]", "", key.lower())


def _misplaced(key: str, value: object, section: str) -> str | None:
    """What to say about a key that means this plugin and is none of its own; None: it is one, or somebody else's."""
    if key in (section, SHORTHAND) or (key == STAMP and isinstance(value, str)):
        return None
    if key in AllReduceConfig.model_fields:
        return f"belongs into {section}: give {{'{section}': {{'{key}': ...}}}}"
    letters = _letters(key)
    names = {_letters(SECTION): section, _letters(SHORTHAND): SHORTHAND}
    close = difflib.get_close_matches(re.sub(_AROUND, "", letters), list(names), n=1, cutoff=_CLOSE)
    if not close and not key.startswith(SECTION) and not letters.startswith("llmallreduce"):
        return None
    meant = names[close[0]] if close else section
    return f"unknown key; allowed are {section}, {SHORTHAND}; did you mean {meant}?"


def _is_same(one: object, other: object) -> bool:
    """Whether two values name one strategy: spellings do not contradict each other."""
    try:
        return AllReduceStrategy.parse(one) is AllReduceStrategy.parse(other)
    except ValueError:  # said about the value itself, once it is looked at
        return bool(one == other)
