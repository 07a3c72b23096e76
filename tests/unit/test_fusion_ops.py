"""The operator that stands for a fused boundary: what it says of its outputs, whom it calls, and what it counts."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch

from llm_allreduce_plugin.engines.common import fusion_ops
from llm_allreduce_plugin.norm import Normed, QuantKind, ScaleLayout
from tests.support.fusion_ranks import OneRank

GROUP = "tp:7"
HIDDEN = 768


@pytest.fixture
def rank() -> OneRank:
    fusion_ops.register_operator()
    communicator = OneRank()
    fusion_ops.serve(GROUP, communicator)  # type: ignore[arg-type]
    return communicator


def arguments(rows: int, kind: str, layout: str, *, norm_too: bool) -> tuple[object, ...]:
    torch.manual_seed(rows)
    x, residual, weight = (torch.randn(*shape).bfloat16() for shape in ((rows, HIDDEN), (rows, HIDDEN), (HIDDEN,)))
    scale = torch.tensor([0.5]) if kind in (QuantKind.FP8, QuantKind.NVFP4) else None
    return x, residual, weight, 1e-5, 1.0, kind, layout, scale, norm_too, GROUP


KINDS = [
    ("", ""),
    (QuantKind.FP8, ScaleLayout.ROWS),
    (QuantKind.FP8_TOKEN, ScaleLayout.ROWS),
    (QuantKind.FP8_GROUP, ScaleLayout.ROWS),
    (QuantKind.FP8_GROUP, ScaleLayout.COLUMNS),
    (QuantKind.FP8_GROUP, fusion_ops.ALIGNED_COLUMNS),
    (QuantKind.FP8_GROUP, ScaleLayout.UE8M0),
    (QuantKind.NVFP4, ScaleLayout.ROWS),
    (QuantKind.NVFP4, ScaleLayout.SWIZZLED),
]


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("rows", (1, 6, 8))
@pytest.mark.parametrize("norm_too", (False, True))
@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_fakes_are_like_what_comes_out(kind: str, layout: str, rows: int, norm_too: bool) -> None:
    given = arguments(rows, str(kind), str(layout), norm_too=norm_too)
    operator = torch.ops.llm_allreduce.all_reduce_rms_norm.default
    real = operator(*given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = operator(*given)
    names = fusion_ops.result_names(str(kind), return_norm=norm_too)
    assert len(real) == len(fake) == len(names)
    for name, one, other in zip(names, real, fake, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride()), name
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("rows", (1, 6, 8))
def test_aligned_columns_begin_at_multiples_of_16_bytes(rows: int) -> None:
    operator = torch.ops.llm_allreduce.all_reduce_rms_norm.default
    aligned = operator(*arguments(rows, "fp8-group", fusion_ops.ALIGNED_COLUMNS, norm_too=False))[-1]
    plain = operator(*arguments(rows, "fp8-group", "rows", norm_too=False))[-1]
    assert torch.equal(aligned, plain)
    assert aligned.stride(0) == 1
    assert aligned.stride(1) * aligned.element_size() % 16 == 0


@pytest.mark.parametrize("rows", (1, 6, 8))
@pytest.mark.parametrize("layout", (ScaleLayout.COLUMNS, fusion_ops.ALIGNED_COLUMNS))
def test_scales_come_out_as_the_communicator_stored_them(layout: str, rows: int) -> None:
    """No copy puts them into the layout that the engine wants."""
    stored: list[int] = []

    class Watched(OneRank):
        def all_reduce_residual_rms_norm(self, *given: Any, **more: Any) -> Normed:
            normed = super().all_reduce_residual_rms_norm(*given, **more)
            assert normed.scale_out is not None
            stored.append(normed.scale_out.data_ptr())
            return normed

    fusion_ops.register_operator()
    communicator = Watched()
    fusion_ops.serve(GROUP, communicator)  # type: ignore[arg-type]
    scales = torch.ops.llm_allreduce.all_reduce_rms_norm.default(
        *arguments(rows, "fp8-group", str(layout), norm_too=False)
    )[-1]
    assert [scales.data_ptr()] == stored


def test_a_group_that_nobody_serves_is_named() -> None:
    fusion_ops.register_operator()
    given = (*arguments(2, "", "", norm_too=False)[:-1], "tp:8")
    with pytest.raises(
        RuntimeError, match=r"fused all-reduce of group 'tp:8': this process has no communicator for it, only for"
    ):
        torch.ops.llm_allreduce.all_reduce_rms_norm.default(*given)


def test_a_communicator_is_not_kept_alive() -> None:
    communicator = OneRank()
    fusion_ops.serve("tp:9", communicator)  # type: ignore[arg-type]
    assert fusion_ops.is_served("tp:9")
    del communicator
    gc.collect()
    assert not fusion_ops.is_served("tp:9")


def test_without_a_kernel_for_the_norm_nothing_is_fused(caplog: pytest.LogCaptureFixture) -> None:
    """Calls in cached graphs run nevertheless."""
    communicators = [OneRank(0), OneRank(1)]
    for communicator in communicators:
        communicator.no_norm_reason = "rank 0 cannot norm a row: no kernel image"
    fusion_ops.register_operator()
    with caplog.at_level(logging.INFO, logger="llm_allreduce_plugin"):
        for communicator in communicators:
            fusion_ops.serve(GROUP, communicator)  # type: ignore[arg-type]
            assert fusion_ops.is_served(GROUP)
            assert not fusion_ops.fuses(GROUP)
            assert GROUP in fusion_ops.unfused_groups()
    assert [record.getMessage() for record in caplog.records] == [
        "all-reduce fusion: layer boundaries of group tp:7 are not fused: rank 0 cannot norm a row: no kernel image"
    ]
    assert len(torch.ops.llm_allreduce.all_reduce_rms_norm.default(*arguments(2, "", "", norm_too=False))) == 2
    fusion_ops.serve(GROUP, capable := OneRank())  # type: ignore[arg-type]
    assert fusion_ops.fuses(GROUP)
    del capable
    gc.collect()
    assert not fusion_ops.fuses(GROUP)


def test_boundaries_are_told_once_a_model_has_run_through(rank: OneRank, caplog: pytest.LogCaptureFixture) -> None:
    weights = [torch.ones(HIDDEN) for _ in range(5)]
    counted = fusion_ops.Boundaries()
    with caplog.at_level(logging.INFO, logger="llm_allreduce_plugin"):
        for _ in range(3):
            for number, weight in enumerate(weights):
                counted.count(weight, "fp8" if number else "")
    assert [record.getMessage() for record in caplog.records] == [
        "all-reduce fusion: 5 layer boundaries are one call each (1 with RMSNorm, 4 with RMSNorm and fp8); "
        "one kernel or two by size and type"
    ]
    assert rank.rank == 0


@pytest.mark.parametrize(("number", "lines"), [(0, 1), (1, 0)])
def test_only_the_first_rank_tells(number: int, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    fusion_ops.register_operator()
    communicator = OneRank(number)
    fusion_ops.serve(GROUP, communicator)  # type: ignore[arg-type]
    given = arguments(2, "", "", norm_too=False)
    with caplog.at_level(logging.INFO, logger="llm_allreduce_plugin"):
        for _ in range(2):
            torch.ops.llm_allreduce.all_reduce_rms_norm.default(*given)
    assert len(caplog.records) == lines
