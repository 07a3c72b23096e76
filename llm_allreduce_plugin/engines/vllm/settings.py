"""The plugin's settings inside vLLM's own: ``additional_config``, and its switch for all-reduce kernels."""

from __future__ import annotations

import os
from typing import Any

from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.engines.common import settings as common
from llm_allreduce_plugin.engines.common.settings import SHORTHAND

_SOURCE = "vLLM additional_config"
_FLAG = "--disable-custom-all-reduce"
# Off unless somebody sets them; those that are on by themselves say nothing of what a user wants.
_SWITCHES = ("VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC", "VLLM_USE_NCCL_SYMM_MEM")


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


def _given(vllm_config: Any, *, custom_all_reduce: bool, device: str) -> list[str]:  # noqa: ANN401
    """The switches by which the user chose among vLLM's own all-reduces, as they are written."""
    found = [_FLAG] if flag_given(vllm_config, custom_all_reduce=custom_all_reduce) else []
    if device.startswith("cuda"):
        found += [
            f"{name}={value}" for name in _SWITCHES if (value := os.environ.get(name, "").strip()) not in ("", "0")
        ]
    return found


def overridden(
    vllm_config: Any,  # noqa: ANN401
    settings: AllReduceConfig,
    *,
    custom_all_reduce: bool,
    device: str = "cuda",
) -> list[str]:
    """What to log where vLLM's switches and an explicit strategy contradict each other. The others: see below.

    The strategy names what is to run, for this plugin; the switches are about all-reduces of vLLM's. So it wins.
    """
    if SHORTHAND not in settings.model_fields_set or settings.allreduce_strategy is AllReduceStrategy.NCCL:
        return []
    given = _given(vllm_config, custom_all_reduce=custom_all_reduce, device=device)
    return [
        f"{switch} is ignored: {SHORTHAND} {settings.allreduce_strategy} was set, and overrides it" for switch in given
    ]


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
    given = _given(vllm_config, custom_all_reduce=custom_all_reduce, device=device)
    if given and SHORTHAND not in settings.model_fields_set:
        return f"{', '.join(given)} was given; set {SHORTHAND} to override it"
    return None


def unfused(vllm_config: Any, settings: AllReduceConfig, *, compiled: bool = False) -> str | None:  # noqa: ANN401
    """Why layer boundaries are not fused under this configuration, or None: they are, in the graphs that vLLM compiles.

    ``compiled``: vLLM's passes run, whatever the configuration says.
    """
    if not settings.fuse_norm:
        return "fuse_norm is off"
    compilation = vllm_config.compilation_config
    pass_config = getattr(compilation, "pass_config", None)
    if getattr(pass_config, "enable_sp", False):
        return "sequence parallelism splits the all-reduces up"
    return None if compiled else uncompiled(vllm_config)


def uncompiled(vllm_config: Any) -> str | None:  # noqa: ANN401
    """Why none of vLLM's passes runs under this configuration, ours or another, or None: they do."""
    mode = getattr(vllm_config.compilation_config, "mode", None)
    if mode is None or getattr(mode, "name", "") == "VLLM_COMPILE":
        return None
    if getattr(getattr(vllm_config, "model_config", None), "enforce_eager", False):
        return "enforce_eager is on, so no graph is compiled"
    return f"compilation mode {getattr(mode, 'name', mode)} has no passes of vLLM's; VLLM_COMPILE has"
