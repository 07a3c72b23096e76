"""The plugin's settings inside vLLM's ``additional_config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, load_config
from llm_allreduce_plugin.errors import ConfigError

SECTION = "allreduce"
SHORTHAND = "allreduce_strategy"
# Where the plugin leaves its version, so that vLLM's compile cache tells versions apart.
STAMP = "llm_allreduce_plugin"

_SOURCE = "vLLM additional_config"


def settings_of(additional_config: object) -> AllReduceConfig:
    """The settings that ``additional_config`` asks for, over file and environment.

    ``{"allreduce": {...}}`` takes every setting; ``{"allreduce_strategy": "ONESHOT"}`` alone is a shorthand.

    Raises:
        ConfigError: naming source, field, value and what is allowed.
    """
    if not isinstance(additional_config, Mapping):
        return load_config()
    section = additional_config.get(SECTION, {})
    if not isinstance(section, Mapping):
        message = f"{_SOURCE}: {SECTION}={section!r}: must be a mapping such as {{'allreduce_strategy': 'ONESHOT'}}"
        raise ConfigError(message)
    for key in additional_config:
        # Other plugins keep their settings here too; only what looks like ours is ours to refuse.
        if isinstance(key, str) and key.startswith("allreduce") and key not in (SECTION, SHORTHAND):
            message = f"{_SOURCE}: {key}={additional_config[key]!r}: unknown key; allowed are {SECTION}, {SHORTHAND}"
            raise ConfigError(message)
    values: dict[str, Any] = dict(section)
    if SHORTHAND in additional_config:
        short = additional_config[SHORTHAND]
        if SHORTHAND in values and values[SHORTHAND] != short:
            message = (
                f"{_SOURCE}: {SHORTHAND}={short!r} contradicts {SECTION}.{SHORTHAND}={values[SHORTHAND]!r}: "
                "give one of them"
            )
            raise ConfigError(message)
        values[SHORTHAND] = short
    return load_config(values, engine_name=_SOURCE)


def stands_aside(vllm_config: Any, settings: AllReduceConfig) -> str | None:  # noqa: ANN401  (vLLM is not imported)
    """Why vLLM is to be left as it is under this configuration (None: outside of one), or None."""
    if vllm_config is not None and getattr(vllm_config.parallel_config, "enable_elastic_ep", False):
        return "elastic expert parallelism requires vLLM's own communicator class"
    if settings.allreduce_strategy is AllReduceStrategy.NCCL:
        return "allreduce_strategy is NCCL"
    return None
