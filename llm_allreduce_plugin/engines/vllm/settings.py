"""The plugin's settings inside vLLM's own: ``additional_config``, and its switch for all-reduce kernels."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Any

from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, load_config
from llm_allreduce_plugin.errors import ConfigError
from llm_allreduce_plugin.settings.values import shown

SECTION = "allreduce"
SHORTHAND = "allreduce_strategy"
# Where the plugin leaves its version, so that vLLM's compile cache tells versions apart.
STAMP = "llm_allreduce_plugin"

_SOURCE = "vLLM additional_config"
# How much of a key must be one of ours (difflib's ratio, letters only) to be a misspelling of it.
_CLOSE = 0.85
# What people put around the name of a section, letters only.
_AROUND = "^v?llm|(?:config|settings|options|args|plugin)$"
_FLAG = "--disable-custom-all-reduce"


def settings_of(additional_config: object) -> AllReduceConfig:
    """The settings that ``additional_config`` asks for, over file and environment.

    ``{"allreduce": {...}}`` takes every setting; ``{"allreduce_strategy": "ONESHOT"}`` alone is a shorthand. Keys that
    plainly mean this plugin and stand elsewhere are errors; other plugins' keys are left alone.

    Raises:
        ConfigError: naming source, field, value and what is allowed.
    """
    if not isinstance(additional_config, Mapping):
        return load_config()
    for key, value in additional_config.items():
        if isinstance(key, str) and (fault := _misplaced(key, value)) is not None:
            message = f"{_SOURCE}: {shown(key)[1:-1]}={shown(value)}: {fault}"
            raise ConfigError(message)
    section = additional_config.get(SECTION, {})
    if not isinstance(section, Mapping):
        message = (
            f"{_SOURCE}: {SECTION}={shown(section)}: must be a mapping such as {{'allreduce_strategy': 'ONESHOT'}}"
        )
        raise ConfigError(message)
    values: dict[str, Any] = dict(section)
    if SHORTHAND in additional_config:
        short = additional_config[SHORTHAND]
        if SHORTHAND in values and not _is_same(values[SHORTHAND], short):
            message = (
                f"{_SOURCE}: {SHORTHAND}={shown(short)} contradicts {SECTION}.{SHORTHAND}={shown(values[SHORTHAND])}: "
                "give one of them"
            )
            raise ConfigError(message)
        values[SHORTHAND] = short
    return load_config(values, engine_name=_SOURCE)


def _letters(key: str) -> str:
    return re.sub("[^a-z0-9]", "", key.lower())


def _misplaced(key: str, value: object) -> str | None:
    """What to say about a key that means this plugin and is none of its own; None: it is one, or somebody else's."""
    if key in (SECTION, SHORTHAND) or (key == STAMP and isinstance(value, str)):
        return None
    if key in AllReduceConfig.model_fields:
        return f"belongs into {SECTION}: give {{'{SECTION}': {{'{key}': ...}}}}"
    letters = _letters(key)
    names = {_letters(name): name for name in (SECTION, SHORTHAND)}
    close = difflib.get_close_matches(re.sub(_AROUND, "", letters), list(names), n=1, cutoff=_CLOSE)
    if not close and not key.startswith(SECTION) and not letters.startswith("llmallreduce"):
        return None
    meant = names[close[0]] if close else SECTION
    return f"unknown key; allowed are {SECTION}, {SHORTHAND}; did you mean {meant}?"


def _is_same(one: object, other: object) -> bool:
    """Whether two values name one strategy: spellings do not contradict each other."""
    try:
        return AllReduceStrategy.parse(one) is AllReduceStrategy.parse(other)
    except ValueError:  # said about the value itself, once it is looked at
        return bool(one == other)


def flag_given(vllm_config: Any, *, custom_all_reduce: bool) -> bool:  # noqa: ANN401  (vLLM is not imported)
    """Whether the user gave ``--disable-custom-all-reduce``.

    vLLM sets it itself where its platform has no such kernel (``custom_all_reduce`` off), and in several versions
    under ``VLLM_BATCH_INVARIANT``: then it tells nothing about what the user wants.
    """
    if vllm_config is None or not custom_all_reduce or os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        return False
    return bool(getattr(vllm_config.parallel_config, "disable_custom_all_reduce", False))


def flag_overridden(vllm_config: Any, settings: AllReduceConfig, *, custom_all_reduce: bool) -> str | None:  # noqa: ANN401
    """What to log where the flag and an explicit strategy contradict each other, or None.

    The strategy names what is to run, for this plugin; the flag is about a kernel of vLLM's. So the strategy wins.
    """
    if SHORTHAND not in settings.model_fields_set or settings.allreduce_strategy is AllReduceStrategy.NCCL:
        return None
    if not flag_given(vllm_config, custom_all_reduce=custom_all_reduce):
        return None
    return f"{_FLAG} does not count for {SHORTHAND} {settings.allreduce_strategy}, which was asked for by name"


def stands_aside(
    vllm_config: Any,  # noqa: ANN401  (vLLM is not imported)
    settings: AllReduceConfig,
    *,
    custom_all_reduce: bool = False,
) -> str | None:
    """Why vLLM is to be left as it is under this configuration (None: outside of one), or None.

    ``custom_all_reduce``: whether vLLM's platform has all-reduce kernels of its own, which a user can disable.
    """
    if vllm_config is not None and getattr(vllm_config.parallel_config, "enable_elastic_ep", False):
        return "elastic expert parallelism requires vLLM's own communicator class"
    if settings.allreduce_strategy is AllReduceStrategy.NCCL:
        return "allreduce_strategy is NCCL"
    if SHORTHAND not in settings.model_fields_set and flag_given(vllm_config, custom_all_reduce=custom_all_reduce):
        return f"{_FLAG} was given ({SHORTHAND}, set by name, would come over it)"
    return None
