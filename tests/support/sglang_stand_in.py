"""SGLang with our hooks in it, and a stand-in for its group of two: what cases in one process are made of.

For any version of SGLang that PYTHONPATH has. Both ranks of the stand-in hold the same parts: the sum of a part is
twice the part. Everything else is SGLang's: norms, layers, models, and the questions that it asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # which is read when SGLang is imported

import torch

from llm_allreduce_plugin.engines.common.fusion_ops import serve
from llm_allreduce_plugin.norm import Normed
from tests.support.fusion_ranks import OneRank

HIDDEN = 64
Case = Callable[[], None]


class Doubled(OneRank):
    """The communicator of the stand-in, which counts fused calls."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__(rank=1)
        self.fused = 0
        self.plain = 0

    def total(self, input_: torch.Tensor) -> torch.Tensor:
        return input_ * 2

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        self.plain += 1
        return self.total(input_)

    def all_reduce_residual_rms_norm(self, *args: Any, **kwargs: Any) -> Normed:
        self.fused += 1
        return super().all_reduce_residual_rms_norm(*args, **kwargs)


def load() -> str:
    """SGLang with our hooks in it; its version."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # Versions differ in which models transformers already has.
    register = CONFIG_MAPPING.register
    CONFIG_MAPPING.register = lambda key, value, exist_ok=False: register(key, value, exist_ok=True)
    import sglang
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import get_context
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    from llm_allreduce_plugin.engines.sglang import fusion, hooks, plugin

    assert hooks.not_applied(plugin.our_hooks()) == []
    assert fusion._installed() is None, fusion._installed()
    arguments = ServerArgs(model_path="dummy", device="cpu")
    if hasattr(arguments, "resolve_once"):
        arguments.resolve_once()
    get_context().set_server_args(arguments)
    return str(sglang.__version__)


def fusion_attribute() -> str:
    """Of a group: where our communicator is."""
    from llm_allreduce_plugin.engines.sglang.boundaries import ATTRIBUTE

    return ATTRIBUTE


def group_of_two() -> tuple[Any, Doubled]:
    """SGLang's own class of groups, without the making of one, in the place of its tensor-parallel groups."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import get_parallel

    group = parallel_state.GroupCoordinator.__new__(parallel_state.GroupCoordinator)
    group.__dict__.update(
        unique_name="tp:0", ranks=[0, 1], rank=0, rank_in_group=0, world_size=2, device=torch.device("cpu"),
        local_size=0, device_group=None, cpu_group=None, pynccl_comm=None, ca_comm=None,
    )  # fmt: skip
    communicator = Doubled()
    setattr(group, fusion_attribute(), communicator)
    serve(group.unique_name, communicator)
    one = SimpleNamespace(ranks=[0], world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)
    for name in ("_TP", "_ATTN_TP", "_MOE_TP"):
        setattr(parallel_state, name, group)
    for name in ("_PP", "_MOE_EP", "_ATTN_CP", "_MOE_DP", "_WORLD"):
        setattr(parallel_state, name, one)
    values = {
        "tp_size": 2, "tp_rank": 0, "tp_group": group, "attn_tp_size": 2, "attn_tp_rank": 0, "attn_tp_group": group,
        "moe_tp_size": 2, "moe_tp_rank": 0, "moe_tp_group": group,
        "moe_ep_size": 1, "moe_ep_rank": 0, "moe_ep_group": one,
        "pp_group": one, "pp_size": 1, "pp_rank": 0, "moe_dp_size": 1, "attn_cp_size": 1, "attn_dp_size": 1,
    }  # fmt: skip
    get_parallel()._overrides.update(values)
    return group, communicator


def tensors(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows)
    return torch.randn(rows, HIDDEN).to(dtype), torch.randn(rows, HIDDEN).to(dtype)
