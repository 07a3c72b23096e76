"""Models of vLLM's that sum by themselves: where that is a boundary of ours they get our call, the others are named.

Some models run FlashInfer's fused kernel from their own code, whatever ``pass_config`` says, because no pass sees them.
An operator of vLLM's for such a boundary, over the communicator of the group, would replace this.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from llm_allreduce_plugin.engines.common import fusion_ops

logger = logging.getLogger("llm_allreduce_plugin")

Boundary = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_GEMMA = "vllm.model_executor.layers.fused_allreduce_gemma_rms_norm"
# The functions of such boundaries: their modules, and what is added to the weight of the norm.
_BOUNDARIES = {
    "fused_allreduce_gemma_rms_norm": (_GEMMA, 1.0),
    "fused_allreduce_rms_norm": ("vllm.models.common.ops.fused_allreduce_rms_norm", 0.0),
}
# Where FlashInfer's kernel is asked for; a model that does so itself, or in an older vLLM, sums with ours when told no.
_QUESTION = "_can_use_flashinfer"
# Other kernels that sum: their modules, and what of those is set once a model uses them. None: they are imported then.
_OTHERS = {
    "vllm.model_executor.layers.minimax_rms_norm.lamport_workspace": None,
    "vllm.models.beam.nvidia.allreduce": None,
    "vllm.models.deepseek_v41.nvidia.ops.mhc": "_all_reduce_mhc",
    "vllm.models.inkling.nvidia.ops.lamport": "_STATE",
}

_replaced: set[str] = set()  # groups whose models get our calls


def replace(group: str, *, wanted: bool) -> None:
    """Give models our call at boundaries of the tensor-parallel ``group``; not ``wanted``: leave them vLLM's."""
    _replaced.discard(group)
    if wanted:
        _install()
        _replaced.add(group)


@functools.cache
def _install() -> None:
    """Once per process; does nothing where this vLLM has no such functions."""
    for name, (module, bias) in _BOUNDARIES.items():
        if (stock := _found(module, name)) is not None:
            _put(name, stock, functools.wraps(stock)(functools.partial(boundary, stock, bias)))
    if (asks := _found(_GEMMA, _QUESTION)) is not None:
        _put(_QUESTION, asks, functools.wraps(asks)(functools.partial(_may_use_flashinfer, asks)))


def _found(module: str, name: str) -> Any:  # noqa: ANN401
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # noqa: BLE001  (a module that this hardware is not for)
        return None


def _put(name: str, stock: object, ours: object) -> None:
    """In every module that has it under this name: models import such functions one by one."""
    for known, module in list(sys.modules.items()):
        if known.startswith("vllm.") and getattr(module, "__dict__", {}).get(name) is stock:
            setattr(module, name, ours)


def _group() -> str | None:
    """The tensor-parallel group of this process, where its models get our calls."""
    from vllm.distributed.parallel_state import get_tp_group

    name = str(get_tp_group().unique_name)
    return name if name in _replaced and fusion_ops.fuses(name) else None


def _may_use_flashinfer(asks: Any, *given: Any, **named: Any) -> tuple[bool, int]:  # noqa: ANN401
    """Around vLLM's question whether FlashInfer's kernel runs for a message, and for how many tokens at most."""
    if _group() is not None:
        return False, 0
    answer: tuple[bool, int] = asks(*given, **named)
    return answer


def boundary(
    stock: Boundary,
    bias: float,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    norm: Any,  # noqa: ANN401
) -> tuple[torch.Tensor, torch.Tensor]:
    """Around what models call for a sum with residual and norm behind it: the norm, and the new residual.

    Args:
        stock: vLLM's function; which sums with ours, too, and norms by itself, what ours cannot.
        bias: added to the weight of the norm.
        hidden_states: this rank's part of the sum, ``[tokens, hidden]``.
        residual: what is added to it.
        norm: the module.
    """
    group = _group()
    is_whole = getattr(norm, "variance_size_override", None) is None and getattr(norm, "has_weight", True)
    if group is None or not is_whole or not fusion_ops.fits(hidden_states, residual, norm.weight):
        return stock(hidden_states, residual, norm)
    arguments = (hidden_states, residual, norm.weight, norm.variance_epsilon, bias, "", "", None, False, group)
    if torch.compiler.is_compiling():
        residual_out, norm_out = torch.ops.llm_allreduce.all_reduce_rms_norm(*arguments)
    else:
        residual_out, norm_out = fusion_ops.all_reduce_rms_norm(*arguments)
    return norm_out, residual_out


# -- what is left ------------------------------------------------------------------------------------------------------


def found(group: str) -> list[str]:
    """What of this process's models sums by itself, by module, and bypasses the strategy."""
    names = [
        module
        for module, state in _OTHERS.items()
        if (loaded := sys.modules.get(module)) is not None
        and (state is None or getattr(loaded, state, None) is not None)
    ]
    flashinfer = getattr(sys.modules.get(_GEMMA), "flashinfer_trtllm_fused_allreduce_norm", None)
    if group not in _replaced and flashinfer is not None:
        names += [name for name, module in list(sys.modules.items()) if _is_model(name) and _asks(module)]
    return sorted(name.removeprefix("vllm.") for name in names)


def _is_model(name: str) -> bool:
    """Whether a module is of a model, and not of what several share."""
    return name.startswith("vllm.models.") and not name.startswith("vllm.models.common.")


def _asks(module: object) -> bool:
    """Whether a model's module has one of the functions that run FlashInfer's kernel."""
    return any(callable(getattr(module, "__dict__", {}).get(name)) for name in (_QUESTION, *_BOUNDARIES))


def say(group: str) -> None:
    """Once a model has been loaded, by the rank that tells."""
    if fusion_ops.tells(group) and (modules := found(group)):
        _say_once(", ".join(modules))


@functools.cache
def _say_once(modules: str) -> None:
    logger.info(
        "all-reduce fusion: this model has kernels of its own that sum, which bypasses allreduce_strategy: %s", modules
    )
