"""The plugin's settings inside SGLang's own, and SGLang's switches that are about the same all-reduces."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.engines.common import settings as common
from llm_allreduce_plugin.engines.common.settings import SHORTHAND
from llm_allreduce_plugin.engines.sglang import flags
from llm_allreduce_plugin.errors import ConfigError

SECTION = "llm_allreduce"
_SOURCE = "SGLang json_model_override_args"

# Fields of SGLang that choose which all-reduce runs, and how users write them. The others need no rule: NVLS is for
# NCCL, which runs what it did; quantized communication has a call of its own, which no hook is at.
_SWITCHES = {
    "disable_custom_all_reduce": "--disable-custom-all-reduce",
    "enable_symm_mem": "--enable-symm-mem",
    "enable_torch_symm_mem": "--enable-torch-symm-mem",
    "enable_mscclpp": "--enable-mscclpp",
}
_SWITCH_VARIABLE = "SGLANG_ENABLE_PCIE_IPC_ALLREDUCE"
_FUSION = "--flashinfer-allreduce-fusion-backend"


def settings_of(server_args: Any) -> AllReduceConfig:  # noqa: ANN401  (SGLang is not imported)
    """The settings that ``ServerArgs`` ask for, over file, environment and the flags of the command line.

    They stand in ``json_model_override_args`` as ``{"llm_allreduce": {...}}``.

    Raises:
        ConfigError: see :func:`llm_allreduce_plugin.engines.common.settings.settings_of`; or the strategy there is not
            the one of the command line.
    """
    given = _override_args(server_args)
    settings = common.settings_of(given, _SOURCE, SECTION)
    flag = flags.given_strategy()
    here = given.get(SHORTHAND, given.get(SECTION, {}).get(SHORTHAND))
    if flag is not None and here is not None and settings.allreduce_strategy is not flag:
        message = f"{_SOURCE}: {SHORTHAND}={here!r} contradicts {flags.STRATEGY} {flag}: give one of them"
        raise ConfigError(message)
    return settings


def _override_args(server_args: Any) -> Mapping[str, Any]:  # noqa: ANN401
    given = getattr(server_args, "json_model_override_args", None)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return {}  # SGLang says what is wrong with it
    return given if isinstance(given, Mapping) else {}


def by_name(settings: AllReduceConfig) -> bool:
    """Whether somebody asked for a strategy of ours by its name."""
    return SHORTHAND in settings.model_fields_set and settings.allreduce_strategy is not AllReduceStrategy.NCCL


def _given(server_args: Any) -> list[str]:  # noqa: ANN401
    """The switches that the user gave, as they are written."""
    found = [flag for field, flag in _SWITCHES.items() if getattr(server_args, field, False)]
    if (
        getattr(server_args, "enable_deterministic_inference", False)
        and _SWITCHES["disable_custom_all_reduce"] in found
    ):
        # Several versions set that one themselves then: it tells nothing about what the user wants.
        found.remove(_SWITCHES["disable_custom_all_reduce"])
    if os.environ.get(_SWITCH_VARIABLE, "").lower() in ("1", "true", "yes", "y", "on", "t"):
        found.append(_SWITCH_VARIABLE)
    return found


def overridden(server_args: Any, settings: AllReduceConfig, *, fuses: bool) -> list[str]:  # noqa: ANN401
    """What to log where SGLang's switches and a strategy by name contradict each other.

    The strategy names what is to run, for this plugin; the switches are about all-reduces of SGLang's. So it wins.
    ``fuses``: layer boundaries are, by this plugin.
    """
    if not by_name(settings):
        return []
    why = f"is ignored: {SHORTHAND} {settings.allreduce_strategy} was set, and overrides it"
    switches = [f"{switch} {why}" for switch in _given(server_args)]
    if fuses and _fusion_given(server_args):
        switches.append(f"{_FUSION} {why}: it fuses layer boundaries, too")
    return switches


def stands_aside(server_args: Any, settings: AllReduceConfig, device: str | None = None) -> str | None:  # noqa: ANN401
    """Why SGLang is to be left as it is under these arguments, or None.

    ``device``: a group's, ``"cuda"``; None: that of the arguments, as far as they name one.
    """
    if getattr(server_args, "elastic_ep_backend", None) is not None:
        return "elastic expert parallelism changes the ranks of its groups while they run"
    device = device or getattr(server_args, "device", None) or "cuda"
    if (reason := common.device_obstacle(device)) is not None:
        return reason
    if settings.allreduce_strategy is AllReduceStrategy.NCCL:
        return f"{SHORTHAND} is NCCL"
    if not by_name(settings) and (switches := _given(server_args)):
        return f"{', '.join(switches)} was given; set {SHORTHAND} to override it"
    return None


def _fusion_given(server_args: Any) -> bool:  # noqa: ANN401
    """Whether the user asked for FlashInfer's fusion.

    In the arguments as they were given: SGLang 0.5.17 writes into the same field what it decides itself, but not before
    ours has been asked (see ``plugin.py``), which then keeps it from doing so.
    """
    if getattr(server_args, "enforce_disable_flashinfer_allreduce_fusion", False):
        return False
    backend = getattr(server_args, "flashinfer_allreduce_fusion_backend", None)
    return backend is not None or bool(getattr(server_args, "enable_flashinfer_allreduce_fusion", False))


def unfused_by_arguments(server_args: Any, settings: AllReduceConfig) -> str | None:  # noqa: ANN401
    """Why layer boundaries are not fused under these arguments, or None: they are, where this SGLang has the hooks.

    Whether it has them: :func:`llm_allreduce_plugin.engines.sglang.fusion.prepare`.
    """
    if not settings.fuse_norm:
        return "fuse_norm is off"
    if not by_name(settings) and _fusion_given(server_args):
        return f"{_FUSION} was given; set {SHORTHAND} to override it"
    if getattr(server_args, "enable_deterministic_inference", False):
        return "deterministic inference asks for SGLang's own norm"
    exchange = getattr(server_args, "moe_a2a_backend", None)
    if exchange not in (None, "none"):
        return f"experts exchange tokens by --moe-a2a-backend {exchange}"
    if getattr(server_args, "enable_dp_attention", False) or getattr(server_args, "attn_dp_size", None) not in (
        None,
        1,
    ):
        return "attention runs data parallel, and layers then end in other collectives"
    # Sums over a part of the tensor-parallel group, which has no communicator of ours.
    if (parts := getattr(server_args, "attn_cp_size", None)) not in (None, 1):
        return f"attention is split by context (attn_cp_size {parts}), and sums over a part of the group"
    if (parts := getattr(server_args, "moe_dp_size", None)) not in (None, 1):
        return f"experts run data parallel (moe_dp_size {parts}), and sum over a part of the group"
    return None


def experts_in_parts(server_args: Any) -> str | None:  # noqa: ANN401
    """Why experts' sums are over a part of the tensor-parallel group, where SGLang does not merge them; or None."""
    ranks = getattr(server_args, "ep_size", None)
    if ranks is None or ranks in (1, server_args.tp_size):
        return None
    return f"experts are split over {ranks} of {server_args.tp_size} ranks, which this SGLang sums by themselves"
