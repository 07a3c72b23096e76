"""vLLM's device communicator with our all-reduce in it."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from llm_allreduce_plugin.engines.common import fusion_ops
from llm_allreduce_plugin.engines.common.stock import own_all_reduce
from llm_allreduce_plugin.engines.vllm import own_kernels
from llm_allreduce_plugin.engines.vllm.plugin import left_alone, stock_communicator_path
from llm_allreduce_plugin.engines.vllm.settings import settings_of, unfused
from llm_allreduce_plugin.topology.links import Transport

if TYPE_CHECKING:
    import torch

    from llm_allreduce_plugin.config import AllReduceConfig

logger = logging.getLogger("llm_allreduce_plugin")


def make_device_communicator(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """What vLLM calls for every group instead of its communicator class, with that class's arguments.

    Tensor-parallel groups get a subclass of the stock class that runs our all-reduce; every other group, and any
    group where :func:`left_alone` has a reason, gets the stock class itself.
    """
    from vllm.config import get_current_vllm_config_or_none
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    stock = resolve_obj_by_qualname(stock_communicator_path(type(current_platform)))
    # vLLM names groups "<kind>:<number>", and passes the name by keyword.
    if str(kwargs.get("unique_name", "")).split(":")[0] != "tp":
        return stock(*args, **kwargs)
    config = get_current_vllm_config_or_none()
    settings = settings_of(config.additional_config if config is not None else None)
    if (reason := left_alone(current_platform, config, settings)) is not None:
        communicator = stock(*args, **kwargs)
        _report_stock(communicator, settings, reason, _name_of(config))
        return communicator
    communicator = _communicator_class(stock)(
        *args, llm_allreduce_settings=settings, llm_allreduce_name=_name_of(config), **kwargs
    )
    if config is None:
        return communicator
    fuses = unfused(config, settings, compiled=True) is None  # models that call us need no compiler
    own_kernels.replace(kwargs["unique_name"], wanted=fuses and not communicator.llm_allreduce.no_norm_reason)
    if communicator.llm_allreduce.rank == 0 and (reason := unfused(config, settings)) is not None:
        logger.info("all-reduce fusion: layer boundaries are not fused: %s", reason)
    return communicator


def _name_of(config: Any) -> str:  # noqa: ANN401
    """What tells this engine's group from those of others that serve the same model: its data-parallel rank."""
    index = getattr(getattr(config, "parallel_config", None), "data_parallel_index", 0)
    return f"dp{index}"


def _report_stock(communicator: Any, settings: AllReduceConfig, reason: str, name: str) -> None:  # noqa: ANN401
    """The stock class runs, so there is nothing of ours to count; the log and the report say so."""
    from llm_allreduce_plugin.engines.common.reports import report_engines_own

    rank, ranks = communicator.rank_in_group, communicator.ranks
    report_engines_own("vLLM", communicator.cpu_group, rank, ranks, settings, reason, name)


@functools.cache
def _communicator_class(stock: type) -> type:
    """The subclass for one stock class (CudaCommunicator; CpuCommunicator on vLLM's CPU platform).

    It must be a subclass: graph capture asserts the type, and reads ``ca_comm`` and others, which stay in place.
    """

    class AllReduceCommunicator(stock):  # type: ignore[misc]
        """``stock`` whose ``all_reduce`` runs on the configured strategy."""

        def __init__(
            self,
            *args: Any,  # noqa: ANN401
            llm_allreduce_settings: AllReduceConfig,
            llm_allreduce_name: str,
            **kwargs: Any,  # noqa: ANN401
        ) -> None:
            super().__init__(*args, **kwargs)
            from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator

            self.llm_allreduce = TensorParallelCommunicator(
                self.device_group,
                self.device,
                llm_allreduce_settings,
                control_group=self.cpu_group,
                fallback=own_all_reduce(
                    "vLLM",
                    self,
                    stock.all_reduce,  # type: ignore[attr-defined]
                    in_place=self.device.type == "cpu",  # on GPUs vLLM's has an output of its own
                ),
                name=llm_allreduce_name,
            )
            self.llm_allreduce.let_graphs_share()  # vLLM's have one memory pool
            self._llm_allreduce_group = kwargs["unique_name"]
            fusion_ops.serve(kwargs["unique_name"], self.llm_allreduce, own_kernels.say)

        def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
            """The first one, by when a model has been loaded. Later ones go straight to ours."""
            self.all_reduce = self.llm_allreduce.all_reduce  # type: ignore[method-assign]
            own_kernels.say(self._llm_allreduce_group)
            return self.llm_allreduce.all_reduce(input_)

        def checkpoint_prepare(self) -> None:
            """vLLM's, where there is nothing of ours that a checkpoint would lose. ``suspend`` is left as it is.

            Raises:
                NotImplementedError: ranks share memory, which no checkpoint of a process holds.
            """
            transport = self.llm_allreduce.facts.transport
            if transport is not Transport.NONE:
                message = (
                    "a checkpoint of vLLM's processes cannot be taken: the all-reduce plugin has mapped memory of each "
                    f"rank into the others' processes ({transport.in_words}), which a checkpoint does not hold; start "
                    "vLLM with allreduce_strategy NCCL"
                )
                raise NotImplementedError(message)
            super().checkpoint_prepare()

        def destroy(self) -> None:
            try:
                self.llm_allreduce.close()
            except Exception:
                # The engine's own clean-up must run whatever was wrong with ours.
                logger.exception("all-reduce: the end was not clean; what failed is below")
            finally:
                super().destroy()

    AllReduceCommunicator.__qualname__ = f"AllReduceCommunicator[{stock.__name__}]"
    return AllReduceCommunicator
