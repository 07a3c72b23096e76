"""Fused calls of the ranks of a local group, and what they must give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.norm import Normed, Quant, QuantKind, ScaleLayout, empty_outputs
from llm_allreduce_plugin.oracle.norm import residual_rms_norm
from tests.support.in_band_rest import assert_at_rest
from tests.support.local_group import LocalGroup
from tests.support.reference import assert_same_bits, rank_input, rank_ordered_sum

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a fused call is spread; rows of a round and rank (``rows_at_once``) for ``chunk_vectors``."""

    lanes: int
    threads: int
    cluster: int = 1
    rows_at_once: int = 1 << 20
    scatter_lanes: int = 0
    drain_lanes: int = 0


@dataclasses.dataclass(frozen=True)
class Boundary:
    """What comes after the sum, the same on every rank."""

    residual: torch.Tensor | None
    weight: torch.Tensor
    eps: float = 1e-5
    weight_bias: float = 0.0
    quant: Quant | None = None
    return_norm: bool = False

    def norm(self, rows: int, native: Any = _C) -> _C.Norm:
        quant = self.quant
        return native.Norm(
            len(self.weight),
            self.eps,
            weight_bias=self.weight_bias,
            quant=_C.QUANT_NONE if quant is None else quant.kind.code,
            scales=_C.SCALES_ROWS if quant is None else quant.layout.code,
            scale_stride=quant.scale_stride(rows) if quant is not None and quant.aligned else 0,
        )

    def expected(self, sums: torch.Tensor) -> Normed:
        return residual_rms_norm(
            sums, self.residual, self.weight, self.eps,
            weight_bias=self.weight_bias, quant=self.quant, return_norm=self.return_norm,
        )  # fmt: skip

    def on(self, device: torch.device) -> Boundary:
        quant = self.quant
        if quant is not None and quant.scale is not None:
            quant = dataclasses.replace(quant, scale=quant.scale.to(device))
        residual = None if self.residual is None else self.residual.to(device)
        return dataclasses.replace(self, residual=residual, weight=self.weight.to(device), quant=quant)


def every_quant(hidden: int) -> list[Quant | None]:
    """Every kind and layout that rows of this length have."""
    kinds: list[Quant | None] = [None, Quant(QuantKind.FP8, torch.tensor([0.017])), Quant(QuantKind.FP8_TOKEN)]
    if hidden % QuantKind.FP8_GROUP.group == 0:
        layouts = (ScaleLayout.ROWS, ScaleLayout.COLUMNS, ScaleLayout.UE8M0)
        kinds += [Quant(QuantKind.FP8_GROUP, layout=layout) for layout in layouts]
        kinds.append(Quant(QuantKind.FP8_GROUP, layout=ScaleLayout.COLUMNS, aligned=True))
    if hidden % QuantKind.NVFP4.group == 0:
        scale = torch.tensor([331.7])
        kinds += [Quant(QuantKind.NVFP4, scale, layout) for layout in (ScaleLayout.ROWS, ScaleLayout.SWIZZLED)]
    return kinds


def random_boundary(
    seed: int, rows: int, hidden: int, dtype: torch.dtype, quant: Quant | None = None, *, residual: bool = True
) -> Boundary:
    return Boundary(
        rank_input(seed, 97, rows * hidden, dtype).view(rows, hidden) if residual else None,
        rank_input(seed, 98, hidden, dtype),
        weight_bias=float(seed % 2),
        quant=quant,
        return_norm=seed % 3 > 0,
    )


POISON = 0xA5


def _bytes(output: torch.Tensor) -> torch.Tensor:
    """All that an output's memory holds, what lies between its columns included."""
    whole = torch.as_strided(output, (output.untyped_storage().nbytes() // output.element_size(),), (1,))
    return whole.view(torch.uint8)


def poison(outputs: Normed) -> Normed:
    for output in outputs:
        if output is not None and output.numel():
            _bytes(output).fill_(POISON)
    return outputs


def assert_nothing_between_columns(outputs: Normed, what: str) -> None:
    """Where scales lie in columns, what was poisoned between them still is."""
    scales = outputs.scale_out
    if scales is None or scales.is_contiguous() or scales.stride(0) != 1:
        return
    rows, columns = scales.shape
    stride = scales.stride(1)
    memory = _bytes(scales).view(-1, scales.element_size())
    for column in range(columns):
        between = memory[column * stride + rows : (column + 1) * stride]
        assert bool((between == POISON).all()), f"{what}: written behind column {column} of scales"


def outputs_for(rows: torch.Tensor, boundary: Boundary) -> Normed:
    """Poisoned room for what comes out for these rows."""
    return poison(empty_outputs(rows, boundary.quant, return_norm=boundary.return_norm))


def tensors_of(outputs: Normed, boundary: Boundary, native: Any = _C) -> _C.NormTensors:
    def address(tensor: torch.Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    return native.NormTensors(
        residual=address(boundary.residual),
        weight=address(boundary.weight),
        norm_out=address(outputs.norm_out),
        quant_out=address(outputs.quant_out),
        scale_out=address(outputs.scale_out),
        scale=address(boundary.quant.scale if boundary.quant is not None else None),
    )


class FusedCall:
    """One size of fused calls of all ranks: plans once, runs as often as wanted."""

    def __init__(
        self,
        group: LocalGroup,
        algorithm: Algorithm,
        exchange: int,
        shape: Shape,
        like: torch.Tensor,
        boundary: Boundary,
    ) -> None:
        self.group = group
        self.boundary = boundary.on(group.device)
        rows, hidden = like.shape
        parts = group.world_size if algorithm is Algorithm.TWO_SHOT else 1
        vectors = hidden * like.element_size() // 16
        slots = group.layout.in_band
        slot = slots.one_shot_bytes if algorithm is Algorithm.ONE_SHOT else slots.two_shot_bytes
        chunk = max(1, min(-(-rows // parts), shape.rows_at_once, slot // 16 // vectors)) * vectors
        native = group.machine.native
        norm = self.boundary.norm(rows, native)
        self.plans = [
            native.Plan(
                workspace, algorithm=int(algorithm), exchange=exchange, count=like.numel(), dtype=_DTYPES[like.dtype],
                lanes=shape.lanes, threads=shape.threads, chunk_vectors=chunk, scatter_lanes=shape.scatter_lanes,
                drain_lanes=shape.drain_lanes, epilogue=_C.RMS_NORM, cluster=shape.cluster, norm=norm,
            )
            for workspace in group.workspaces
        ]  # fmt: skip

    def start(self, rank: int, input_: torch.Tensor, outputs: Normed, stream: torch.cuda.Stream | None = None) -> None:
        """Launch one rank's kernel, on its stream if no other is given."""
        tensors = tensors_of(outputs, self.boundary, self.group.machine.native)
        on = (self.group.streams[rank] if stream is None else stream).cuda_stream
        status = self.plans[rank].normed(input_.data_ptr(), outputs.residual_out.data_ptr(), on, tensors)
        assert status == 0

    def outputs(self, like: torch.Tensor) -> Normed:
        return outputs_for(like, self.boundary)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[Normed]:
        """Every rank's results, poisoned before; afterwards slots and epochs are as they must be."""
        group = self.group
        moved = [part.to(group.device) for part in inputs]
        outputs = [self.outputs(part) for part in moved]
        group.machine.synchronize()
        for rank in range(group.world_size):
            self.start(rank, moved[rank], outputs[rank])
        group.machine.synchronize()
        assert_at_rest(group.buffers, group._locals(), group.layout)
        return outputs


def assert_same(actual: Normed, expected: Normed, what: str) -> None:
    """Bit by bit, but for the payload of a NaN."""
    for name, output, reference in zip(Normed._fields, actual, expected, strict=True):
        assert (output is None) == (reference is None), f"{what}: {name}"
        if output is None or reference is None:
            continue
        got, wanted = output.cpu(), reference.cpu()
        if got.dtype.itemsize == 1 or not got.dtype.is_floating_point:
            kind = torch.uint8 if got.dtype.itemsize == 1 else got.dtype
            wrong = got.contiguous().view(kind) != wanted.contiguous().view(kind)
            assert not wrong.any(), f"{what}: {name}: {int(wrong.sum())} differ, first at {wrong.nonzero()[0].tolist()}"
        else:
            assert_same_bits(got.contiguous(), wanted.contiguous(), f"{what}: {name}")


def check(
    group: LocalGroup,
    algorithm: Algorithm,
    exchange: int,
    shape: Shape,
    inputs: Sequence[torch.Tensor],
    boundary: Boundary,
    what: str,
) -> list[Normed]:
    """All ranks' results against the oracle."""
    call = FusedCall(group, algorithm, exchange, shape, inputs[0], boundary)
    outputs = call.run(inputs)
    expected = boundary.expected(rank_ordered_sum(inputs))
    for rank, output in enumerate(outputs):
        assert_same(output, expected, f"{what}, rank {rank}")
        assert_nothing_between_columns(output, f"{what}, rank {rank}")
    return outputs
