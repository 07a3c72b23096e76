"""SGLang's tensor-parallel groups with our all-reduce in them."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch

from llm_allreduce_plugin.engines.common import fusion_ops
from llm_allreduce_plugin.engines.common.stock import own_all_reduce
from llm_allreduce_plugin.engines.sglang import fusion, hooks
from llm_allreduce_plugin.engines.sglang.boundaries import ATTRIBUTE
from llm_allreduce_plugin.engines.sglang.hooks import Hook
from llm_allreduce_plugin.engines.sglang.settings import settings_of, stands_aside

if TYPE_CHECKING:
    from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator

logger = logging.getLogger("llm_allreduce_plugin")

# SGLang names groups "<kind>:<number>". PD-multiplexing runs prefill on a second group of the same ranks.
_OURS = ("tp", "pdmux_prefill_tp")
# Parts of a tensor-parallel group, where attention or experts are split otherwise than the rest.
_PARTS = ("attention_tp", "moe_tp", "moe_ep", "shared_experts_tp")
_GROUP = "sglang.srt.distributed.parallel_state.GroupCoordinator"


def communicator_in(group: Any) -> TensorParallelCommunicator | None:  # noqa: ANN401
    """Our communicator of a group, or None."""
    found: TensorParallelCommunicator | None = getattr(group, ATTRIBUTE, None)
    return found


def equip(_result: None, group: Any, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401
    """After a group was made: those of tensor parallelism get a communicator. Collective.

    Raises:
        ConfigError: a setting is wrong.
        AllReduceError: see :class:`~llm_allreduce_plugin.runtime.communicator.TensorParallelCommunicator`.
    """
    kind, _, number = group.unique_name.partition(":")
    if group.world_size == 1:
        return
    if kind not in _OURS:
        if kind in _PARTS and group.rank_in_group == 0:
            logger.info(
                "all-reduce: group %s is a part of the tensor-parallel group and keeps SGLang's own all-reduce",
                group.unique_name,
            )
        return
    server_args = _server_args()
    settings = settings_of(server_args)
    name = f"{kind}{number}"
    reason = stands_aside(server_args, settings, group.device.type)
    if reason is None and (lost := hooks.not_applied(HOOKS)):
        reason = hooks.not_installed(lost)
    if reason is not None:
        from llm_allreduce_plugin.engines.common.reports import report_engines_own

        report_engines_own("SGLang", group.cpu_group, group.rank_in_group, group.ranks, settings, reason, name)
        return
    from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator

    settings.check_world_size(group.world_size)
    communicator = TensorParallelCommunicator(
        group.device_group,
        group.device,
        settings,
        control_group=group.cpu_group,
        fallback=own_all_reduce("SGLang", group, sum_apart, in_place=False),
        name=name,
    )
    communicator.let_graphs_share()  # SGLang's have one memory pool
    setattr(group, ATTRIBUTE, communicator)
    fusion_ops.serve(group.unique_name, communicator)
    if not communicator.no_norm_reason:  # which serve() has told
        fusion.install(server_args, settings, talks=group.rank_in_group == 0)


def sum_apart(group: Any, input_: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """SGLang's own all-reduce, which never writes or returns its input.

    What its compiled graphs call sums into another tensor, without a copy where the library below can do that. What
    layers call may sum in place, and gets a copy: on CPU ranks, which have nothing else, and where the other one would
    use an NCCL that was not loaded.
    """
    apart = getattr(group, "_all_reduce_out_place", None)
    nccl = getattr(group, "pynccl_comm", None)
    if apart is None or input_.device.type == "cpu" or not (nccl is None or getattr(nccl, "available", True)):
        output: torch.Tensor = inspect.unwrap(type(group).all_reduce)(group, input_.clone())
        return output
    # It goes by addresses and counts: elements must lie without gaps.
    dense = input_ if torch.ops.aten.is_non_overlapping_and_dense(input_) else input_.contiguous()
    found: torch.Tensor = apart(dense, "auto")
    return found


def _server_args() -> Any:  # noqa: ANN401
    """SGLang's arguments; None where somebody uses its groups without a server."""
    from sglang.srt.runtime_context import get_server_args

    try:
        return get_server_args()
    except ValueError:
        return None


def all_reduce(
    original: Any,  # noqa: ANN401
    group: Any,  # noqa: ANN401
    input_: torch.Tensor,
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> torch.Tensor:
    """Around ``GroupCoordinator.all_reduce``: ours, or the original."""
    communicator = communicator_in(group)
    if communicator is None or input_.device != communicator.device or args or kwargs:
        output: torch.Tensor = original(group, input_, *args, **kwargs)
        return output
    if torch.compiler.is_compiling():
        traced: torch.Tensor = torch.ops.llm_allreduce.all_reduce(input_, group.unique_name)
        return traced
    return communicator.all_reduce(input_)


def close(group: Any, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401
    """Before a group is destroyed."""
    communicator = communicator_in(group)
    if communicator is None:
        return
    delattr(group, ATTRIBUTE)
    try:
        communicator.close()
    except Exception:
        # The engine's own clean-up must run whatever was wrong with ours.
        logger.exception("all-reduce: the end was not clean; what failed is below")


HOOKS = (
    Hook(f"{_GROUP}.__init__", equip, "AFTER"),
    Hook(f"{_GROUP}.all_reduce", all_reduce, "AROUND"),
    Hook(f"{_GROUP}.destroy", close, "BEFORE"),
)
