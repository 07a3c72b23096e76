"""Checks of norms behind all-reduces that run on every rank, CPU or GPU: bits of the oracle, and alike on all ranks."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from llm_allreduce_plugin import TensorParallelCommunicator
from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.norm import Normed
from llm_allreduce_plugin.oracle import norm
from llm_allreduce_plugin.runtime import norm_calls
from tests.support.checks import communicator, judges
from tests.support.norm_group import (
    Boundary,
    assert_nothing_between_columns,
    assert_same,
    every_quant,
    poison,
    random_boundary,
)
from tests.support.reference import bits, rank_input, rank_ordered_sum, special_inputs


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Every output is filled with garbage first, so unwritten elements cannot pass by luck."""
    empty_outputs = norm_calls.empty_outputs

    def poisoned(*args: Any, **kw: Any) -> Normed:
        return poison(empty_outputs(*args, **kw))

    with (
        mock.patch.object(norm_calls, "empty_outputs", poisoned),
        mock.patch.object(norm, "empty_outputs", poisoned),  # where no kernel norms
    ):
        yield


def digest(outputs: Normed) -> str:
    """Equal exactly when all bits are."""
    found = hashlib.sha256()
    for output in outputs:
        if output is not None and output.numel():
            plain = output.cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
            found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def run(group: TensorParallelCommunicator, input_: torch.Tensor, boundary: Boundary) -> Normed:
    return group.all_reduce_residual_rms_norm(
        input_,
        boundary.residual,
        boundary.weight,
        boundary.eps,
        weight_bias=boundary.weight_bias,
        quant=boundary.quant,
        return_norm=boundary.return_norm,
    )


def norm_out_of_place(
    context: RankContext, group: TensorParallelCommunicator, input_: torch.Tensor, boundary: Boundary, what: str
) -> Normed:
    """Norm the sum of all ranks' inputs, of which this one is on the CPU, and check that nothing else is written."""
    there = boundary.on(context.device)
    given = [input_.to(context.device), there.weight]
    given += [] if there.residual is None else [there.residual]
    before = [tensor.clone() for tensor in given]
    with poisoned_outputs():
        outputs = run(group, given[0], there)
    assert_nothing_between_columns(outputs, what)
    for tensor, copy in zip(given, before, strict=True):
        assert torch.equal(bits(tensor), bits(copy)), f"{what}: an input was written"
    addresses = [tensor.data_ptr() for tensor in (*given, *outputs) if tensor is not None and tensor.numel()]
    assert len(set(addresses)) == len(addresses), f"{what}: tensors share memory"
    return outputs


def norm_and_compare(
    context: RankContext,
    group: TensorParallelCommunicator,
    inputs: Sequence[torch.Tensor],
    boundary: Boundary,
    what: str,
) -> Normed:
    """Norm the sum of ``inputs`` (all on the CPU, all ranks' alike) and check everything promised."""
    outputs = norm_out_of_place(context, group, inputs[context.rank], boundary, what)
    assert_same(outputs, boundary.expected(rank_ordered_sum(inputs)), what)
    return outputs


@contextlib.contextmanager
def wherever_it_can() -> Iterator[None]:
    """One kernel for sum and norm runs wherever it can, also where two are faster."""
    always = {key: {max(sizes): (0, None)} for key, sizes in measured.FUSED_PAYS.items()}
    with mock.patch.object(measured, "FUSED_PAYS", always):
        yield


def check_shapes(
    context: RankContext,
    strategy: str,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]],
    settings: dict[str, Any],
    name: str,
) -> list[str]:
    """Rows and hidden sizes with every quantization by turns; digests of all outputs. ``name``: what is counted.

    One kernel runs wherever it can, also where two are faster.
    """
    digests = []
    # A profile, of this node or shipped, would say where two kernels run.
    with wherever_it_can(), communicator(context, strategy, **{"tuning_profile": "none"} | settings) as group:
        for number, (rows, hidden) in enumerate(shapes):
            quants = every_quant(hidden)
            for turn in range(2):
                seed = 1000 * number + turn  # the same for every strategy and setting that is compared
                quant = quants[(number + turn * 3) % len(quants)]
                boundary = random_boundary(seed, rows, hidden, dtype, quant, residual=(number + turn) % 4 > 0)
                what = f"{strategy} {settings} {dtype} {rows} x {hidden}, {quant}, rank {context.rank}"
                mine = rank_input(seed, context.rank, rows * hidden, dtype).view(rows, hidden)
                outputs = norm_out_of_place(context, group, mine, boundary, what)
                if judges(context, len(digests)):
                    inputs = [rank_input(seed, rank, rows * hidden, dtype) for rank in range(context.world_size)]
                    expected = boundary.expected(rank_ordered_sum(inputs).view(rows, hidden))
                    assert_same(outputs, expected, what)
                digests.append(digest(outputs))
        assert set(group.report()["calls"]) == {name}, group.report()
        everyone = context.gather(digests)
    assert all(other == everyone[0] for other in everyone), f"ranks differ: {everyone}"
    return digests


def check_specials(context: RankContext, strategy: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """NaN, infinities, subnormals and signed zeros, a value with a value to a row of eight."""
    with communicator(context, strategy, **settings) as group:
        inputs = [part.repeat_interleave(8).view(-1, 8) for part in special_inputs(context.world_size, dtype)]
        rows = inputs[0].shape[0]
        for quant in every_quant(8):
            boundary = random_boundary(5, rows, 8, dtype, quant)
            norm_and_compare(context, group, inputs, boundary, f"{strategy} {dtype} special values, {quant}")
        context.gather(None)


BATCHES = (1, 2, 3, 5, 8, 31, 64, 257, 1030, 4096)


def check_batches(context: RankContext, hidden: int, settings: dict[str, Any]) -> None:
    """A row's result has the same bits whatever batch it comes in, and wherever in it."""
    dtype, most = torch.bfloat16, BATCHES[-1]
    inputs = [rank_input(7, rank, most * hidden, dtype).view(most, hidden) for rank in range(context.world_size)]
    boundary = random_boundary(7, most, hidden, dtype)
    assert boundary.residual is not None
    expected = boundary.expected(rank_ordered_sum(inputs))
    there = boundary.on(context.device)
    mine = inputs[context.rank].to(context.device)
    with communicator(context, "AUTO", **settings) as group, poisoned_outputs():
        for rows in BATCHES:
            for first in {0, most - rows}:
                part = slice(first, first + rows)
                assert there.residual is not None
                outputs = group.all_reduce_residual_rms_norm(
                    mine[part], there.residual[part], there.weight, there.eps, weight_bias=there.weight_bias
                )
                wanted = Normed(*(None if whole is None else whole[part] for whole in expected))
                assert_same(outputs, wanted, f"{rows} rows from {first}")


def limits_of_batches(hidden: int) -> list[tuple[int | None, str]]:
    """What a profile may say of fused calls so that the batches run in one kernel, in two, and back again."""
    row = 2 * hidden
    return [(2 * row, "fused"), (8 * row, "then-norm"), (64 * row, "fused"), (None, "then-norm")]


def runs_of_batches(context: RankContext, hidden: int, settings: dict[str, Any]) -> list[str]:
    """Every batch checked, and what each runs as."""
    check_batches(context, hidden, settings)
    with communicator(context, "AUTO", **settings) as group:
        return [group.explain_fused((rows, hidden), torch.bfloat16).counted_as for rows in BATCHES]


def check_views(context: RankContext, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """Many dimensions, strides, unaligned starts: values in logical order, contiguous results of the input's shape."""
    hidden = 48
    storages = [rank_input(11, rank, 2 * 6 * hidden * 5 + 1, dtype) for rank in range(context.world_size)]
    views = {
        "three dimensions": lambda t: t[: 6 * 5 * hidden].view(6, 5, hidden),
        "one row": lambda t: t[:hidden],
        "odd start": lambda t: t[1 : 1 + 4 * hidden].view(4, hidden),
        "every other row": lambda t: t[: 10 * hidden].view(10, hidden)[::2],
        "transposed": lambda t: t[: 5 * hidden].view(hidden, 5).t(),
        "every other column": lambda t: t[: 8 * hidden].view(4, 2 * hidden)[:, ::2],
        "expanded": lambda t: t[:hidden].view(1, hidden).expand(3, hidden),
    }
    with communicator(context, "AUTO", **settings) as group:
        for name, view in views.items():
            parts = [view(storage) for storage in storages]
            residual, weight = view(rank_input(12, 0, storages[0].numel(), dtype)), rank_input(13, 0, hidden, dtype)
            moved = view(storages[context.rank].to(context.device))
            there = view(rank_input(12, 0, storages[0].numel(), dtype).to(context.device))
            with poisoned_outputs():
                outputs = group.all_reduce_residual_rms_norm(moved, there, weight.to(context.device), 1e-6)
            total = rank_ordered_sum([part.contiguous() for part in parts])
            expected = Boundary(residual, weight, 1e-6).expected(total)
            assert_same(outputs, expected, f"{dtype} {name}")
            for output in outputs[:2]:
                assert output is not None
                assert output.is_contiguous()
                assert output.shape == moved.shape
        context.gather(None)
