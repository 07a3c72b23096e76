"""What changes in vLLM, and why. Each patch names the upstream hook that would replace it.

1. ``Platform.get_device_communicator_cls`` returns our factory. vLLM resolves that string and calls it for every group;
   there is no registry for communicators (a hook was asked for in vLLM issue 22319, closed).
2. ``Platform.get_pass_manager_cls`` returns our factory: the stock pass manager with our fusion pass in it, before the
   passes that would take the norms away. A place in the order of passes, for passes of plugins, would replace it
   (``inductor_compile_config["post_grad_custom_post_pass"]`` has the last one).
3. ``Platform.check_and_update_config`` is followed by ours: it refuses bad settings before any worker starts, turns off
   FlashInfer's fusion of all-reduces where ours replaces it, and stamps what compiled graphs depend on into
   ``additional_config``, which is part of vLLM's compile-cache key. A config hook for general plugins would replace it.
4. Functions by which some models run FlashInfer's fused kernel themselves: see ``own_kernels.py``.
5. ``VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY`` names our variables, too: vLLM's own means for those of plugins.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from typing import TYPE_CHECKING, Any

from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.engines.common import versions
from llm_allreduce_plugin.engines.common.fusion_ops import register_operator
from llm_allreduce_plugin.engines.common.logs import use_logging_of
from llm_allreduce_plugin.engines.common.reports import read_reports
from llm_allreduce_plugin.engines.common.settings import STAMP
from llm_allreduce_plugin.engines.vllm.settings import overridden, settings_of, stands_aside, uncompiled, unfused

if TYPE_CHECKING:
    from llm_allreduce_plugin.config import AllReduceConfig

logger = logging.getLogger("llm_allreduce_plugin")

FACTORY = "llm_allreduce_plugin.engines.vllm.communicator.make_device_communicator"
PASS_MANAGER = "llm_allreduce_plugin.engines.vllm.fusion.make_pass_manager"  # noqa: S105
TRIED = ((0, 26), (0, 33))
_METHODS = ("get_device_communicator_cls", "get_pass_manager_cls", "check_and_update_config")
_PREFIX, _RAY_PREFIXES = "LLM_ALLREDUCE_", "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
_PATCHED = "_llm_allreduce_patched"


def _use_vllm_logging() -> None:
    use_logging_of("vllm")


def register() -> None:
    """Install the patches. Called by vLLM in every process, any number of times; makes no CUDA call."""
    import vllm
    from vllm.platforms import current_platform

    _use_vllm_logging()
    platform = type(current_platform)
    if platform.__dict__.get(_PATCHED, False):
        return
    version = str(getattr(vllm, "__version__", "of an unknown version"))
    if absent := missing(platform):
        logger.warning(
            "vLLM %s is left alone, as if this plugin were not installed: its %s has no %s",
            version,
            platform.__name__,
            ", ".join(absent),
        )
        return
    if (doubt := versions.untried("vLLM", version, *TRIED, "all methods to patch")) is not None:
        logger.warning("%s", doubt)
    register_operator()
    _carry_by_ray()
    _patch_communicator(platform)
    _patch_pass_manager(platform)
    _patch_config(platform)
    setattr(platform, _PATCHED, True)


def _carry_by_ray() -> None:
    """Let vLLM's executor on Ray give workers our variables: it copies those that it knows, and prefixes named here."""
    found = os.environ.get(_RAY_PREFIXES, "")
    if _PREFIX not in (part.strip() for part in found.split(",")):
        os.environ[_RAY_PREFIXES] = ",".join(filter(None, (found, _PREFIX)))


def missing(platform: type) -> list[str]:
    """The methods of ours to patch that this version of vLLM does not have."""
    return [name for name in _METHODS if not callable(getattr(platform, name, None))]


def stock_communicator_path(platform: type) -> str:
    """The dotted path that vLLM would have used."""
    return str(platform._llm_allreduce_stock_path())  # type: ignore[attr-defined]  # noqa: SLF001


def stock_pass_manager_path(platform: type) -> str:
    """The dotted path that vLLM would have used."""
    return str(platform._llm_allreduce_stock_pass_manager_path())  # type: ignore[attr-defined]  # noqa: SLF001


def _patch_communicator(platform: type) -> None:
    stock = platform.get_device_communicator_cls  # type: ignore[attr-defined]

    def get_device_communicator_cls(cls: type) -> str:  # noqa: ARG001
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        # Elastic EP compares the class that this names with vLLM's own, so it must not see a factory.
        if config is not None and getattr(config.parallel_config, "enable_elastic_ep", False):
            return str(stock())
        return FACTORY

    platform._llm_allreduce_stock_path = staticmethod(stock)  # type: ignore[attr-defined]  # noqa: SLF001
    platform.get_device_communicator_cls = classmethod(get_device_communicator_cls)  # type: ignore[attr-defined]


def _patch_pass_manager(platform: type) -> None:
    stock = platform.get_pass_manager_cls  # type: ignore[attr-defined]
    platform._llm_allreduce_stock_pass_manager_path = staticmethod(stock)  # type: ignore[attr-defined]  # noqa: SLF001
    platform.get_pass_manager_cls = classmethod(lambda cls: PASS_MANAGER)  # type: ignore[attr-defined]  # noqa: ARG005


def _patch_config(platform: type) -> None:
    stock = platform.check_and_update_config  # type: ignore[attr-defined]

    def check_and_update_config(cls: type, vllm_config: Any) -> None:  # noqa: ANN401
        stock(vllm_config)
        _use_vllm_logging()  # which vLLM may have set up only after it loaded plugins
        custom = has_custom_all_reduce(cls, vllm_config)
        apply_settings(vllm_config, custom_all_reduce=custom, device=device_of(cls))

    platform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[attr-defined]


def has_custom_all_reduce(platform: Any, vllm_config: Any = None) -> bool:  # noqa: ANN401
    """Whether vLLM has all-reduce kernels here, which ``--disable-custom-all-reduce`` is about.

    Where it has none it sets that itself: on some platforms, and in some versions (0.26) with ``--nnodes`` above 1.
    """
    ask = getattr(platform, "use_custom_allreduce", None)
    if ask is None or not ask():
        return False
    parallel: Any = getattr(vllm_config, "parallel_config", None)
    return getattr(parallel, "nnodes", 1) == 1 or not _disables_over_nodes(type(parallel))


def _disables_over_nodes(kind: type) -> bool:
    """Whether this class of vLLM's disables those kernels by itself where there are several nodes."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return False
    return re.search(r"nnodes > 1:\s+self\.disable_custom_all_reduce = True", source) is not None


def device_of(platform: Any) -> str:  # noqa: ANN401
    """The type of the platform's devices, as torch calls it; empty where vLLM has found no platform."""
    return str(getattr(platform, "device_type", ""))


def left_alone(platform: Any, vllm_config: Any, settings: AllReduceConfig) -> str | None:  # noqa: ANN401
    """:func:`stands_aside` of this platform."""
    custom = has_custom_all_reduce(platform, vllm_config)
    return stands_aside(vllm_config, settings, custom_all_reduce=custom, device=device_of(platform))


def apply_settings(vllm_config: Any, *, custom_all_reduce: bool = False, device: str = "cuda") -> None:  # noqa: ANN401
    """Make ``vllm_config`` fit the plugin's settings. The others: of the platform, see :func:`stands_aside`.

    Raises:
        ConfigError: a setting is wrong; vLLM then does not start.
    """
    settings = settings_of(vllm_config.additional_config)
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return
    if stands_aside(vllm_config, settings, custom_all_reduce=custom_all_reduce, device=device) is not None:
        return
    for line in overridden(vllm_config, settings, custom_all_reduce=custom_all_reduce, device=device):
        logger.warning("%s", line)
    settings.check_world_size(vllm_config.parallel_config.tensor_parallel_size)
    _apply_fusion(vllm_config, unfused(vllm_config, settings), uncompiled(vllm_config))
    if settings.report_dir is not None:
        read_reports(settings.report_dir, _use_vllm_logging)
    if isinstance(vllm_config.additional_config, dict):
        # Graphs compiled with our pass and without it are different ones, wherever the setting came from.
        vllm_config.additional_config[STAMP] = __version__ if settings.fuse_norm else f"{__version__} unfused"


def _apply_fusion(vllm_config: Any, reason: str | None, no_passes: str | None) -> None:  # noqa: ANN401
    """Turn FlashInfer's fusion off where ours replaces it. The reasons: of :func:`unfused` and :func:`uncompiled`."""
    pass_config = getattr(vllm_config.compilation_config, "pass_config", None)
    if pass_config is None or not getattr(pass_config, "fuse_allreduce_rms", False):
        return
    if reason is None:
        pass_config.fuse_allreduce_rms = False
        logger.info(
            "compilation pass fuse_allreduce_rms turned off: FlashInfer's fused kernel would bypass "
            "allreduce_strategy; this plugin fuses the same layer boundaries"
        )
    else:
        logger.info(
            "compilation pass fuse_allreduce_rms left on, because this plugin does not replace it: %s; %s",
            reason,
            "the all-reduces that it fuses bypass allreduce_strategy"
            if no_passes is None
            else "it does not run, so no all-reduce bypasses allreduce_strategy by it",
        )
