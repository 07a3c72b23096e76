"""What the definition of a layer's boundary promises: no split, batch or shape changes the bits; close to exact."""

from __future__ import annotations

import pytest
import torch

from llm_allreduce_plugin.norm import Normed, Quant, QuantKind, ScaleLayout
from llm_allreduce_plugin.oracle.norm import residual_rms_norm, sum_of_squares
from tests.support.norm_group import assert_same, every_quant
from tests.support.reference import DTYPES, bits, fresh_seed, rank_input


@pytest.mark.parametrize("threads", (32, 128, 512))
@pytest.mark.parametrize("hidden", (8, 2880, 4096, 8192, 16384))
def test_the_sum_of_squares_is_the_same_however_it_is_split(hidden: int, threads: int) -> None:
    """As a block of threads would: each warp a tile of 32 units by butterflies, then tiles in pairs."""
    rows = rank_input(fresh_seed(), 0, 3 * hidden, torch.float32).view(3, hidden)
    units = torch.zeros(3, -(-hidden // 8 // threads) * threads)
    for unit in range(hidden // 8):
        q = (rows[:, unit * 8 : unit * 8 + 8] ** 2).unbind(1)
        units[:, unit] = ((q[0] + q[1]) + (q[2] + q[3])) + ((q[4] + q[5]) + (q[6] + q[7]))
    tiles = []
    for first in range(0, units.shape[1], 32):
        lanes = units[:, first : first + 32].clone()
        for distance in (1, 2, 4, 8, 16):
            lanes = lanes + lanes[:, torch.arange(32) ^ distance]
        assert torch.equal(lanes, lanes[:, :1].expand(-1, 32)), "all lanes have the same sum"
        tiles.append(lanes[:, 0])
    while len(tiles) > 1:
        tiles += [torch.zeros(3)] * (len(tiles) % 2)
        tiles = [tiles[i] + tiles[i + 1] for i in range(0, len(tiles), 2)]
    assert torch.equal(sum_of_squares(rows), tiles[0])


@pytest.mark.parametrize("hidden", (8, 4096, 16392))
def test_more_leaves_change_nothing(hidden: int) -> None:
    rows = rank_input(fresh_seed(), 0, 2 * hidden, torch.float32).view(2, hidden)
    wider = torch.nn.functional.pad(rows, (0, (1 << 17) - hidden))
    assert torch.equal(sum_of_squares(rows), sum_of_squares(wider))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    seed, hidden = fresh_seed(), 2048
    sums = rank_input(seed, 0, 40 * hidden, dtype).view(40, hidden)
    residual, weight = rank_input(seed, 1, 40 * hidden, dtype).view(40, hidden), rank_input(seed, 2, hidden, dtype)
    for quant in every_quant(hidden):
        if quant is not None and quant.layout is not ScaleLayout.ROWS:
            continue  # their scales lie elsewhere in another batch
        whole = residual_rms_norm(sums, residual, weight, 1e-5, quant=quant, return_norm=True)
        for rows in (slice(0, 1), slice(7, 20)):
            part = residual_rms_norm(sums[rows], residual[rows], weight, 1e-5, quant=quant, return_norm=True)
            expected = Normed(*(None if output is None else output[rows] for output in whole))
            assert_same(part, expected, f"{quant}, seed {seed}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", (8, 2880, 8192))
def test_close_to_torchs_norm_in_fp64(dtype: torch.dtype, hidden: int) -> None:
    seed = fresh_seed()
    sums = rank_input(seed, 0, 16 * hidden, dtype).view(16, hidden)
    residual, weight = rank_input(seed, 1, 16 * hidden, dtype).view(16, hidden), rank_input(seed, 2, hidden, dtype)
    outputs = residual_rms_norm(sums, residual, weight, 1e-6)
    r = outputs.residual_out.double()
    expected = torch.nn.functional.rms_norm(r, (hidden,), weight.double(), 1e-6)
    assert outputs.norm_out is not None
    unit = torch.finfo(dtype).eps / 2
    error = (outputs.norm_out.double() - expected).abs()
    # One rounding to the type, and a few of fp32 before it; fp16 has subnormals in between.
    assert bool((error <= expected.abs() * (unit + 2e-6) + torch.finfo(dtype).smallest_normal * unit).all())


def test_any_shape_and_no_rows() -> None:
    weight = torch.ones(64)
    for shape in ((64,), (2, 3, 64), (0, 64)):
        sums = torch.randn(shape)
        outputs = residual_rms_norm(sums, None, weight, 1e-5, quant=Quant(QuantKind.FP8_TOKEN), return_norm=True)
        assert outputs.norm_out is not None and outputs.quant_out is not None and outputs.scale_out is not None
        assert outputs.norm_out.shape == outputs.residual_out.shape == outputs.quant_out.shape == shape
        assert outputs.scale_out.shape == (sums.numel() // 64, 1)
        assert torch.equal(bits(outputs.residual_out), bits(sums))


@pytest.mark.parametrize("kind", list(QuantKind))
def test_quantized_values_are_as_close_as_their_format(kind: QuantKind) -> None:
    """Codes times scales are the normed rows, within half a step of the format."""
    rows = rank_input(fresh_seed(), 0, 8 * 1024, torch.bfloat16).view(8, 1024)
    given = {QuantKind.FP8: torch.tensor([0.25]), QuantKind.NVFP4: torch.tensor([448 * 6 / 30.0])}.get(kind)
    outputs = residual_rms_norm(
        rows, None, torch.ones(1024, dtype=torch.bfloat16), 1e-6, quant=Quant(kind, given), return_norm=True
    )
    assert outputs.norm_out is not None and outputs.quant_out is not None
    y = outputs.norm_out.double()
    if kind is QuantKind.NVFP4:
        assert outputs.scale_out is not None and given is not None
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
        pairs = torch.stack([outputs.quant_out & 15, outputs.quant_out >> 4], -1).view(8, 1024)
        scale = (outputs.scale_out.double() / given.double()).repeat_interleave(16, -1)
        # A scale is off by a sixteenth at most, so the largest may lie beyond 6, and elsewhere a step is at most 2.
        assert bool(((table[pairs.long()] * scale - y).abs() <= scale * 1.001).all())
        return
    scale = (
        given
        if outputs.scale_out is None
        else outputs.scale_out.repeat_interleave(1024 // outputs.scale_out.shape[1], -1)
    )
    assert scale is not None
    back = outputs.quant_out.double() * scale.double()
    assert bool(((back - y).abs() <= y.abs() / 16 + scale.double() * 2**-10 + 1e-6 * y.abs()).all())
