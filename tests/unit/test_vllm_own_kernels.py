"""Models of vLLM's that sum by themselves, as far as that needs no vLLM: which are named, and by whom."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from llm_allreduce_plugin.engines.common import fusion_ops
from llm_allreduce_plugin.engines.vllm import own_kernels
from tests.support.fusion_ranks import OneRank

GROUP = "tp:4"
MHC, LAMPORT = (
    "vllm.models.deepseek_v41.nvidia.ops.mhc",
    "vllm.model_executor.layers.minimax_rms_norm.lamport_workspace",
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been said, and no module of vLLM's that matters here is loaded."""
    own_kernels._say_once.cache_clear()
    monkeypatch.setattr(own_kernels, "_replaced", {GROUP})
    monkeypatch.setattr(sys, "modules", {name: it for name, it in sys.modules.items() if not name.startswith("vllm")})


def module(name: str, **content: Any) -> None:
    made = ModuleType(name)
    made.__dict__.update(content)
    sys.modules[name] = made


def test_kernels_that_are_in_use_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="llm_allreduce_plugin")
    communicator = OneRank()
    fusion_ops.serve(GROUP, communicator)  # type: ignore[arg-type]
    module(MHC, _all_reduce_mhc=None)
    own_kernels.say(GROUP)
    assert caplog.records == []
    module(MHC, _all_reduce_mhc="a kernel")
    module(LAMPORT)
    for _ in range(2):
        own_kernels.say(GROUP)
    assert [record.getMessage() for record in caplog.records] == [
        "all-reduce fusion: this model has kernels of its own that sum, which bypasses allreduce_strategy: "
        "model_executor.layers.minimax_rms_norm.lamport_workspace, models.deepseek_v41.nvidia.ops.mhc"
    ]


def test_only_the_rank_that_tells(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="llm_allreduce_plugin")
    communicator = OneRank(rank=1)
    fusion_ops.serve(GROUP, communicator)  # type: ignore[arg-type]
    module(LAMPORT)
    own_kernels.say(GROUP)
    assert caplog.records == []


def test_where_our_calls_are_not_wanted_their_users_are_named() -> None:
    module(own_kernels._GEMMA, flashinfer_trtllm_fused_allreduce_norm=lambda: None)
    module("vllm.models.common.ops.fused_allreduce_rms_norm", fused_allreduce_rms_norm=lambda: None)
    module("vllm.models.of_a_test", fused_allreduce_rms_norm=lambda: None)
    module("vllm.models.another", something=1)
    assert own_kernels.found(GROUP) == []
    own_kernels.replace(GROUP, wanted=False)
    assert own_kernels.found(GROUP) == ["models.of_a_test"]
    module(own_kernels._GEMMA, flashinfer_trtllm_fused_allreduce_norm=None)
    assert own_kernels.found(GROUP) == [], "there is no FlashInfer"


def test_it_is_looked_for_when_a_model_has_run_through() -> None:
    looked: list[str] = []
    communicator = OneRank()
    fusion_ops.serve(GROUP, communicator, looked.append)  # type: ignore[arg-type]
    boundaries = fusion_ops._boundaries[GROUP]
    weight = torch.ones(8)
    for _ in range(3):
        boundaries.count(weight, "")
    assert looked == [GROUP]
