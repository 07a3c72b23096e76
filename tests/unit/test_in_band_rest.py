"""The check of workspaces between in-band calls sees what is wrong with them; on CPU memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.group.layouts import host_layout
from llm_allreduce_plugin.transport.symmetric import initialize
from tests.support.in_band_rest import EPOCH_PLANES, assert_at_rest, in_band_epochs

HEADER = Path(__file__).parents[2] / "csrc" / "host" / "layout.h"
RANKS, LANES = 3, 5


def workspaces(layout: _C.Layout) -> list[torch.Tensor]:
    buffers = [torch.empty(layout.total_bytes, dtype=torch.uint8) for _ in range(RANKS)]
    for buffer in buffers:
        initialize(buffer, layout)
    return buffers


@pytest.fixture(params=(0, 1 << 20), ids=("in band", "in band and flagged"))
def layout(request: pytest.FixtureRequest) -> _C.Layout:
    return _C.make_layout(RANKS, LANES, in_band_bytes=1 << 20, flagged_bytes=request.param)


def test_planes_of_epochs_are_those_of_the_header() -> None:
    found = re.search(r"enum class EpochPlane : int \{([^}]*)\}", HEADER.read_text(encoding="utf-8"))
    assert found is not None
    names = [name.strip() for name in found[1].split(",")]
    planes = ("kPushed", "kOneShotShared", "kTwoShotShared", "kInSwitch")
    assert dict(zip(EPOCH_PLANES, map(names.index, planes), strict=True)) == EPOCH_PLANES


def test_a_word_in_any_slot_is_seen(layout: _C.Layout) -> None:
    end = layout.flagged.one_shot_offset or layout.total_bytes
    slots = layout.in_band
    second = slots.one_shot_offset + slots.generation_bytes
    assert second + slots.generation_bytes == end
    for byte in (slots.one_shot_offset, slots.gather_offset, second - 4, second, end - 4):
        for value in (0, -1, 1):
            buffers = workspaces(layout)
            assert_at_rest(buffers, buffers, layout)
            buffers[2][byte : byte + 4].view(torch.int32).fill_(value)
            with pytest.raises(AssertionError, match=rf"rank 2: 1 words .* the first at byte {byte} of"):
                assert_at_rest(buffers, buffers, layout)


def test_other_words_do_not_count(layout: _C.Layout) -> None:
    buffers = workspaces(layout)
    buffers[1][: layout.epochs_offset].fill_(7)
    after = layout.epochs_offset + (max(EPOCH_PLANES.values()) + 1) * LANES * 4
    buffers[1][after : layout.in_band.one_shot_offset].fill_(7)
    if layout.flagged.one_shot_offset:
        buffers[1][layout.flagged.one_shot_offset :].fill_(7)
    assert_at_rest(buffers, buffers, layout)


@pytest.mark.parametrize("plane", EPOCH_PLANES)
def test_an_epoch_of_any_lane_is_seen(layout: _C.Layout, plane: str) -> None:
    for lane in range(LANES):
        for whole_rank in (False, True):
            buffers = workspaces(layout)
            for buffer in buffers:
                in_band_epochs(buffer, layout)[:] = torch.tensor([[7], [-1], [0], [3]])  # planes differ, as they may
            assert_at_rest(buffers, buffers, layout)
            row = in_band_epochs(buffers[1], layout)[list(EPOCH_PLANES).index(plane)]
            row[slice(None) if whole_rank else lane] += 1
            with pytest.raises(AssertionError, match=f"in-band epochs of {plane} differ"):
                assert_at_rest(buffers, buffers, layout)


def test_workspaces_in_host_memory() -> None:
    """Published slots are not cleared at once; epochs lie elsewhere."""
    layout = host_layout(RANKS, LANES, 1 << 20)
    buffers = workspaces(layout)
    locals_ = [torch.zeros(layout.local_bytes, dtype=torch.uint8) for _ in range(RANKS)]
    buffers[0][layout.in_band.one_shot_offset :].fill_(1)
    assert_at_rest(buffers, locals_, layout)
    in_band_epochs(locals_[2], layout)[list(EPOCH_PLANES).index("shared TWOSHOT"), LANES - 1] = 1
    with pytest.raises(AssertionError, match="in-band epochs of shared TWOSHOT differ"):
        assert_at_rest(buffers, locals_, layout)
