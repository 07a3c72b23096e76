"""The plugin's settings inside vLLM's own: ``additional_config``, and its switch for all-reduce kernels."""

from __future__ import annotations

import os
from typing import Any

from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.engines.common import settings as common
from llm_allreduce_plugin.engines.common.settings import SHORTHAND

_SOURCE = "vLLM additional_config"
_FLAG = "--disable-custom-all-reduce"


def settings_of(additional_config: object) -> AllReduceConfig:
    """The settings that ``additional_config`` asks for, over file and environment.

    Raises:
        ConfigError: see :func:`llm_allreduce_plugin.engines.common.settings.settings_of`.
    """
    return common.settings_of(additional_config, _SOURCE)


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
    return f"{_FLAG} is ignored: {SHORTHAND} {settings.allreduce_strategy} was set, and overrides it"


def stands_aside(
    vllm_config: Any,  # noqa: ANN401  (vLLM is not imported)
    settings: AllReduceConfig,
    *,
    custom_all_reduce: bool = False,
    device: str = "cuda",
) -> str | None:
    """Why vLLM is to be left as it is under this configuration (None: outside of one), or None.

    Args:
        vllm_config: vLLM's.
        settings: the plugin's.
        custom_all_reduce: whether vLLM's platform has all-reduce kernels of its own, which a user can disable.
        device: of vLLM's platform, as torch calls it; empty: it has none.
    """
    if device and (reason := common.device_obstacle(device)) is not None:
        return reason
    if vllm_config is not None and getattr(vllm_config.parallel_config, "enable_elastic_ep", False):
        return "elastic expert parallelism requires vLLM's own communicator class"
    if settings.allreduce_strategy is AllReduceStrategy.NCCL:
        return "allreduce_strategy is NCCL"
    if SHORTHAND not in settings.model_fields_set and flag_given(vllm_config, custom_all_reduce=custom_all_reduce):
        return f"{_FLAG} was given; set {SHORTHAND} to override it"
    return None


def unfused(vllm_config: Any, settings: AllReduceConfig, *, compiled: bool | None = None) -> str | None:  # noqa: ANN401
    """Why layer boundaries are not fused under this configuration, or None: they are, in the graphs that vLLM compiles.

    ``compiled``: whether vLLM's passes run; by default, what the configuration says.
    """
    if not settings.fuse_norm:
        return "fuse_norm is off"
    compilation = vllm_config.compilation_config
    pass_config = getattr(compilation, "pass_config", None)
    if getattr(pass_config, "enable_sp", False):
        return "sequence parallelism splits the all-reduces up"
    mode = getattr(compilation, "mode", None)
    if compiled is None:
        compiled = mode is None or getattr(mode, "name", "") == "VLLM_COMPILE"
    if compiled:
        return None
    if getattr(getattr(vllm_config, "model_config", None), "enforce_eager", False):
        return "enforce_eager is on, so no graph is compiled"
    return f"compilation mode {getattr(mode, 'name', mode)} has no passes of vLLM's; VLLM_COMPILE has"
