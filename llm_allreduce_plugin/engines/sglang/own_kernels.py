"""Models whose own kernels sum through SGLang's custom all-reduce: they go on doing so, and the log says it once.

Such kernels are given SGLang's communicator when the model is made, and keep it in a map of their module.
"""

from __future__ import annotations

import functools
import logging
import sys

from llm_allreduce_plugin.engines.sglang import hooks
from llm_allreduce_plugin.engines.sglang.hooks import Hook

logger = logging.getLogger("llm_allreduce_plugin")

_LOADED = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
_KERNELS = "sglang.kernels.ops."
_MAP = "_COMM_MAP"


@functools.cache
def watch() -> None:
    """Look for such kernels once a model is loaded. Once per process; does nothing where SGLang has no such moment."""
    if hooks.exists(_LOADED):
        hooks.add_late([Hook(_LOADED, say, "AFTER")])


def found() -> list[str]:
    """The modules of kernels that were given SGLang's communicator."""
    modules = [(name, module) for name, module in list(sys.modules.items()) if name.startswith(_KERNELS)]
    return sorted(name.removeprefix(_KERNELS) for name, module in modules if getattr(module, _MAP, None))


def say(_result: object, *_args: object, **_kwargs: object) -> None:
    """After a model was loaded."""
    if modules := found():
        _say_once(", ".join(modules))


@functools.cache
def _say_once(modules: str) -> None:
    logger.info(
        "all-reduce fusion: this model has kernels of its own that sum through SGLang's custom all-reduce, "
        "which bypasses allreduce_strategy: %s",
        modules,
    )
