"""Models whose own kernels sum through SGLang's custom all-reduce: they go on doing so, and the log says it once.

Such kernels are given SGLang's communicator when the model is made, and keep it in a map of their module, or at each
call.
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
# Which give it to kernels at each call.
_SGLANG = "sglang.srt."
_BEAM, _DECODE = "sglang.srt.models.beam", "sglang.srt.layers.moe.qwen4_decode"


@functools.cache
def watch() -> None:
    """Look for such kernels once a model is loaded. Once per process; does nothing where SGLang has no such moment."""
    if hooks.exists(_LOADED):
        hooks.add_late([Hook(_LOADED, say, "AFTER")])


def found(model: object = None) -> list[str]:
    """The modules of kernels that were given SGLang's communicator, or that ``model`` will give it."""
    modules = [(name, module) for name, module in list(sys.modules.items()) if name.startswith(_KERNELS)]
    names = [name.removeprefix(_KERNELS) for name, module in modules if getattr(module, _MAP, None)]
    of_model = {kind.__module__ for kind in type(model).__mro__}
    if _BEAM in of_model:
        names.append(_BEAM.removeprefix(_SGLANG))
    # Which is loaded by the one model that may use it, and then has a communicator if that does.
    made = getattr(getattr(sys.modules.get(_DECODE), "_get_decode_comm", None), "cache_info", None)
    if made is not None and made().currsize:
        names.append(_DECODE.removeprefix(_SGLANG))
    return sorted(names)


def say(_result: object, *args: object, **_kwargs: object) -> None:
    """After a model was loaded, by its runner, which comes first."""
    if modules := found(getattr(args[0], "model", None) if args else None):
        _say_once(", ".join(modules))


@functools.cache
def _say_once(modules: str) -> None:
    logger.info(
        "all-reduce fusion: this model has kernels of its own that sum through SGLang's custom all-reduce, "
        "which bypasses allreduce_strategy: %s",
        modules,
    )
