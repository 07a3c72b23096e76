"""How the answer of an all-reduce with a norm behind it is judged: what goes in beside the sum, what must come out."""

from __future__ import annotations

import torch

from llm_allreduce_plugin.measure import answers
from llm_allreduce_plugin.norm import Normed, Quant, QuantKind
from llm_allreduce_plugin.oracle.norm import residual_rms_norm

# Of values like these, about: what a model would be calibrated to.
LARGEST_NORM = 6.0
FP8_LARGEST, FP4_LARGEST = 448.0, 6.0
FP8_STEP = 1 / 8  # between two neighbours in e4m3, relative to the smaller one
SMALLEST_FP8 = 2.0**-9
# Of e2m1 without the sign, by code; and from there to the next larger one, or, of the largest, the next smaller.
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_GAPS = (0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0)


def make_beside(
    seed: int, rows: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual ``[rows, hidden]`` and weight ``[hidden]``, the same on every rank."""
    generator = torch.Generator(device).manual_seed(seed)
    residual = torch.randn(rows, hidden, generator=generator, device=device)
    weight = 1 + torch.randn(hidden, generator=generator, device=device) / 4
    return residual.to(dtype), weight.to(dtype)


def make_quant(kind: QuantKind | None, device: torch.device) -> Quant | None:
    """How norms are quantized, with the scale that a model would have been calibrated to."""
    if kind is None:
        return None
    largest = {QuantKind.FP8: LARGEST_NORM / FP8_LARGEST, QuantKind.NVFP4: FP8_LARGEST * FP4_LARGEST / LARGEST_NORM}
    scale = torch.tensor([largest[kind]], device=device) if kind in largest else None
    return Quant(kind, scale)


def expected(
    total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, quant: Quant | None
) -> Normed:
    """What must come out of a sum, ``norm_out`` included."""
    return residual_rms_norm(total, residual, weight, eps, quant=quant, return_norm=True)


def wrong_elements(
    answer: Normed, expected_: Normed, *, exact: bool, world_size: int, quant: Quant | None = None
) -> int:
    """Elements of an answer that are not what they must be. ``quant``: how it is quantized.

    Exact implementations must give the very bits. Others, whose sums, roundings and order of additions differ, are held
    to what that can cost: ``residual_out`` as the sum alone, ``norm_out`` to a few roundings of each element, and what
    is quantized to the next value, in groups beside what a norm may be off by; where that has scales of another shape,
    all bits count.
    """
    pairs = [(got, want) for got, want in zip(answer, expected_, strict=True) if got is not None and want is not None]
    if exact:
        return sum(_differing(got, want) for got, want in pairs)
    wrong = answers.wrong_elements(answer.residual_out, expected_.residual_out, exact=False, world_size=world_size + 1)
    if answer.norm_out is not None and expected_.norm_out is not None:
        wrong += _wrong_norms(answer.norm_out.float(), expected_.norm_out.float(), answer.norm_out.dtype, world_size)
    if answer.quant_out is None or expected_.quant_out is None:
        return wrong
    scales = answer.scale_out
    if answer.quant_out.dtype == torch.float8_e4m3fn and (scales is None or scales.shape[1] == 1):
        return wrong + _wrong_fp8(answer, expected_)
    if quant is not None and all(got.shape == want.shape and got.dtype == want.dtype for got, want in pairs[-2:]):
        return wrong + _wrong_groups(answer, expected_, quant, world_size)
    return wrong + sum(_differing(got, want) for got, want in pairs[-2:])


def _differing(got: torch.Tensor, want: torch.Tensor) -> int:
    """Elements whose bits differ; all, where shapes or types do."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return max(got.numel(), want.numel())
    size = got.element_size()
    plain = (tensor.clone(memory_format=torch.contiguous_format).reshape(-1) for tensor in (got, want))
    left, right = (tensor.view(torch.uint8).view(-1, size) for tensor in plain)
    return int((left != right).any(dim=1).sum())


def _norms_may_be_off(want: torch.Tensor, dtype: torch.dtype, world_size: int) -> torch.Tensor:
    return (world_size + 4) * torch.finfo(dtype).eps * (want.abs() + 1)


def _wrong_norms(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, world_size: int) -> int:
    allowed = _norms_may_be_off(want, dtype, world_size)
    return int(((got - want).abs() > allowed).sum()) + int(got.isnan().sum())


def _wrong_fp8(answer: Normed, expected_: Normed) -> int:
    """By values: codes times their scales, where there are."""
    assert answer.quant_out is not None
    assert expected_.quant_out is not None
    got, want = answer.quant_out.float(), expected_.quant_out.float()
    least = torch.tensor(SMALLEST_FP8, device=got.device)
    if answer.scale_out is not None and expected_.scale_out is not None:
        got, want, least = got * answer.scale_out, want * expected_.scale_out, least * expected_.scale_out
    return int(((got - want).abs() > 1.5 * FP8_STEP * want.abs() + 2 * least).sum()) + int(got.isnan().sum())


def _codes(quantized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What codes mean, and how far the next value is, both without their scales."""
    if quantized.dtype != torch.uint8:
        values = quantized.float()
        return values, FP8_STEP * values.abs() + SMALLEST_FP8
    codes = torch.stack((quantized & 15, quantized >> 4), -1).flatten(-2).long()
    magnitude = torch.tensor(_FP4_VALUES, device=quantized.device)[codes & 7]
    gaps = torch.tensor(_FP4_GAPS, device=quantized.device)[codes & 7]
    return torch.where((codes & 8).bool(), -magnitude, magnitude), gaps


def _wrong_groups(answer: Normed, expected_: Normed, quant: Quant, world_size: int) -> int:
    """By values: codes times the scales of their groups. A group's scale may be the next one, too."""
    group, dtype = quant.kind.group, answer.residual_out.dtype
    values = []
    for each in (answer, expected_):
        assert each.quant_out is not None
        assert each.scale_out is not None
        scales = each.scale_out.float().repeat_interleave(group, -1)
        if quant.scale is not None:
            scales = scales / quant.scale.to(scales.device)
        codes, gaps = _codes(each.quant_out)
        values.append((codes * scales, gaps * scales))
    (got, _), (want, gap) = values
    allowed = 1.5 * gap + FP8_STEP * want.abs() + _norms_may_be_off(want, dtype, world_size)
    return int(((got - want).abs() > allowed).sum()) + int(got.isnan().sum())
