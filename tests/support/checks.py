"""Checks that run on every rank, CPU or GPU. Each compares bits with the rank-ordered reference and between ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin import _C, TensorParallelCommunicator
from llm_allreduce_plugin.group.layouts import workspace_layout
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.runtime import calls
from llm_allreduce_plugin.transport.mapped import MappedMemory
from llm_allreduce_plugin.transport.symmetric import SymmetricMemory
from tests.support.in_band_rest import assert_at_rest, in_band_epochs
from tests.support.reference import assert_same_bits, bits, digest, poison, rank_input, rank_ordered_sum, special_inputs


@contextlib.contextmanager
def communicator(context: RankContext, strategy: str, **settings: Any) -> Iterator[TensorParallelCommunicator]:
    made = context.communicator(strategy, **settings)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Every output is filled with garbage first, so unwritten elements cannot pass by luck."""
    empty_like = torch.empty_like
    empty_strided = calls._empty_strided

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return (
            poison(empty_like(*args, **kwargs).contiguous()) if args[0].is_contiguous() else empty_like(*args, **kwargs)
        )

    all_reduce = TensorParallelCommunicator.all_reduce

    def poisoned_all_reduce(
        group: TensorParallelCommunicator, input_: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        eager: Any = group._eager_call
        if not isinstance(eager, _C.EagerCalls):
            return all_reduce(group, input_, out)
        made_by: Any = eager.empty_strided
        eager.empty_strided = lambda *args: poison(made_by(*args))
        try:
            return all_reduce(group, input_, out)
        finally:
            eager.empty_strided = made_by

    with (
        mock.patch.object(torch, "empty_like", poisoned),
        mock.patch.object(calls, "_empty_strided", lambda *args: poison(empty_strided(*args))),
        mock.patch.object(TensorParallelCommunicator, "all_reduce", poisoned_all_reduce),
    ):
        yield


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Outputs, and the sums that travel, are filled with garbage first: what nobody writes, or sends, shows."""
    empty = torch.empty
    with (
        poisoned_outputs(),
        mock.patch.object(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs), 0x7F)),
    ):
        yield


def judges(context: RankContext, turn: int) -> bool:
    """Whether this rank compares the call of this number with the reference, which takes longer than the call.

    For tests that compare digests of all ranks' outputs, too: then what is right on one rank is right on all.
    """
    return turn % context.world_size == context.rank


def reduce_out_of_place(
    context: RankContext, group: TensorParallelCommunicator, input_: torch.Tensor, what: str
) -> torch.Tensor:
    """All-reduce this rank's input, on the CPU, and check that it is neither written nor aliased."""
    mine = input_.to(context.device)
    before = mine.clone()
    with poisoned_outputs():
        output = group.all_reduce(mine)
    assert torch.equal(bits(mine), bits(before)), f"{what}: the input was written"
    assert output.numel() == 0 or output.data_ptr() != mine.data_ptr(), f"{what}: the output aliases the input"
    return output


def reduce_and_compare(
    context: RankContext, group: TensorParallelCommunicator, inputs: Sequence[torch.Tensor], what: str
) -> torch.Tensor:
    """All-reduce this rank's entry of ``inputs`` (all on the CPU, all ranks' alike) and check everything promised."""
    output = reduce_out_of_place(context, group, inputs[context.rank], what)
    assert_same_bits(output, rank_ordered_sum(inputs), what)
    return output


def check_at_rest(context: RankContext, group: TensorParallelCommunicator) -> None:
    """Where GPUs reach each other's memory: what the next in-band call relies on. Collective, between calls."""
    memory = group._held.memory
    if not isinstance(memory, SymmetricMemory | MappedMemory):
        return
    layout = workspace_layout(group.config, group.facts, group.facts.multiprocessors or 0)
    buffer = memory.own
    assert buffer is not None
    assert buffer.numel() == layout.total_bytes
    torch.cuda.synchronize(context.device)
    context.gather(None)  # from now on no peer is in a call
    assert_at_rest([buffer], [buffer], layout, first_rank=context.rank)
    epochs = context.gather(in_band_epochs(buffer, layout).tolist())
    assert all(other == epochs[0] for other in epochs), f"in-band epochs differ, [rank][plane][lane]: {epochs}"


def check_sizes(
    context: RankContext, strategy: str, dtype: torch.dtype, sizes: Sequence[int], settings: dict[str, Any]
) -> str:
    """Contiguous messages of each size; returns the digests of all outputs, to compare strategies."""
    digests = []
    with communicator(context, strategy, **settings) as group:
        for turn, size in enumerate(sizes):
            seed = context.shared_seed()
            what = f"{strategy} {dtype} x {size}, rank {context.rank} of {context.world_size}"
            output = reduce_out_of_place(context, group, rank_input(seed, context.rank, size, dtype), what)
            if judges(context, turn):
                inputs = [rank_input(seed, rank, size, dtype) for rank in range(context.world_size)]
                assert_same_bits(output, rank_ordered_sum(inputs), what)
            digests.append(digest(output))
        assert set(group.report()["calls"]) <= {strategy}, group.report()
        check_at_rest(context, group)
        everyone = context.gather(digests)
    assert all(other == everyone[0] for other in everyone), f"ranks differ: {everyone}"
    return strategy


def check_specials(context: RankContext, strategy: str, dtype: torch.dtype, settings: dict[str, Any]) -> list[str]:
    """NaN, infinities, subnormals and signed zeros; a zero result is +0."""
    with communicator(context, strategy, **settings) as group:
        inputs = special_inputs(context.world_size, dtype)
        output = reduce_and_compare(context, group, inputs, f"{strategy} {dtype} special values").cpu()
    zeros = output == 0
    assert zeros.any()
    assert not torch.signbit(output[zeros]).any(), "a zero result must be +0"
    assert output.isnan().any()
    assert output.isinf().any()
    return context.gather(digest(output))


def check_views(context: RankContext, strategy: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """Unaligned starts, strides, many dimensions: values in logical order, layout like the input's."""
    world_size, device = context.world_size, context.device
    with communicator(context, strategy, **settings) as group:
        for offset in (1, 3, 5):
            seed = context.shared_seed()
            storages = [rank_input(seed, rank, 4099, dtype) for rank in range(world_size)]
            # Moved as a whole and cut there, so that the odd offset survives.
            mine = storages[context.rank].to(device)[offset:]
            output = group.all_reduce(mine)
            assert_same_bits(output, rank_ordered_sum([s[offset:] for s in storages]), f"offset {offset}")
        seed = context.shared_seed()
        bases = [rank_input(seed, rank, 6 * 35 * 4, dtype).reshape(6, 35, 4) for rank in range(world_size)]
        views = {
            "transposed": lambda t: t.transpose(0, 2),
            "every other column": lambda t: t[:, ::2],
            "every third row from 1": lambda t: t[1::3],
            "slice of the last dimension": lambda t: t[..., 1:3],
            "expanded": lambda t: t[:1].expand(5, 35, 4),
            "scalar": lambda t: t[2, 3, 1],
            "4-D": lambda t: t.reshape(2, 3, 5, 28),
        }
        for name, view in views.items():
            mine = view(bases[context.rank].to(device))
            before = mine.clone()
            output = group.all_reduce(mine)
            expected = rank_ordered_sum([view(base).contiguous() for base in bases])
            assert_same_bits(output, expected, f"{strategy} {dtype} {name}")
            assert output.stride() == torch.empty_like(mine).stride(), f"{name}: strides {output.stride()}"
            assert torch.equal(mine, before)
        context.gather(None)


def check_strategies_agree(context: RankContext, dtype: torch.dtype, size: int, settings: dict[str, Any]) -> None:
    """ONESHOT and TWOSHOT give the same bits, and so does a row whatever batch it came in."""
    seed = context.shared_seed()
    width = 96
    inputs = [
        rank_input(seed, rank, size // width * width, dtype).reshape(-1, width) for rank in range(context.world_size)
    ]
    mine = inputs[context.rank].to(context.device)
    outputs = {}
    for strategy in ("ONESHOT", "TWOSHOT", "AUTO", "MINLATENCY"):
        with communicator(context, strategy, one_shot_max_bytes=4096, **settings) as group:
            outputs[strategy] = group.all_reduce(mine).cpu()
            for rows in (1, 2, 17, mine.shape[0] // 2):
                part = group.all_reduce(mine[:rows]).cpu()
                assert_same_bits(part, outputs[strategy][:rows], f"{strategy}: rows 0..{rows} of {mine.shape[0]}")
    assert_same_bits(outputs["ONESHOT"], outputs["TWOSHOT"], "ONESHOT against TWOSHOT")
    for strategy in ("AUTO", "MINLATENCY"):
        assert_same_bits(outputs[strategy], outputs["TWOSHOT"], f"{strategy} against TWOSHOT")


def check_sequence(context: RankContext, calls: int, settings: dict[str, Any]) -> None:
    """Many calls of changing size, strategy and dtype on one workspace: epochs and slots must never mix up."""
    seed = context.shared_seed()
    generator = torch.Generator().manual_seed(seed)
    with communicator(context, "ONESHOT", **settings) as one, communicator(context, "TWOSHOT", **settings) as two:
        for call in range(calls):
            size = int(
                torch.randint(1, 1 << int(torch.randint(1, 16, (), generator=generator)), (), generator=generator)
            )
            dtype = (torch.float32, torch.float16, torch.bfloat16)[int(torch.randint(0, 3, (), generator=generator))]
            group = (one, two)[int(torch.randint(0, 2, (), generator=generator))]
            inputs = [rank_input(seed + call, rank, size, dtype) for rank in range(context.world_size)]
            reduce_and_compare(context, group, inputs, f"call {call}: {size} x {dtype}, seed {seed}")
        for group in (one, two):
            check_at_rest(context, group)


def check_every_value(context: RankContext, strategy: str, dtype: torch.dtype) -> None:
    """Every bit pattern of a 16-bit type on rank 0, meeting others elsewhere: conversions and rounding."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(context.shared_seed())
    orders = [torch.randperm(1 << 16, generator=generator) for _ in range(context.world_size)]
    with communicator(context, strategy) as group:
        alone = [patterns] + [torch.zeros_like(patterns)] * (context.world_size - 1)
        reduce_and_compare(context, group, alone, f"{strategy} {dtype}: every value plus zeros")
        mixed = [patterns[order] for order in orders]
        reduce_and_compare(context, group, mixed, f"{strategy} {dtype}: every value, shuffled on each rank")


def check_other_inputs(context: RankContext) -> None:
    """What no kernel takes: integers go to the fallback; another device is refused; a closed communicator says so."""
    with communicator(context, "ONESHOT") as group:
        integers = torch.arange(10, device=context.device)
        before = integers.clone()
        assert torch.equal(group.all_reduce(integers), integers * context.world_size)
        assert torch.equal(integers, before)
        doubles = torch.ones(3, 4, dtype=torch.float64, device=context.device).t()
        assert torch.equal(group.all_reduce(doubles), doubles * context.world_size)
        assert group.report()["calls"] == {"NCCL": 2}
        assert group.report()["fallbacks"] == {
            "ONESHOT -> NCCL": "no kernel for dtype int64 (there are for float32, float16, bfloat16); "
            "no kernel for dtype float64 (there are for float32, float16, bfloat16)"
        }
        with pytest.raises(ValueError, match="input is on meta"):
            group.all_reduce(torch.ones(1, device="meta"))
    group.close()  # idempotent
    with pytest.raises(RuntimeError, match="closed"):
        group.all_reduce(torch.ones(1, device=context.device))


BATCHES = (1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 100, 128, 256, 257, 512, 777, 1024, 2048, 2049, 4095, 4096)


def check_batches(context: RankContext, width: int, settings: dict[str, Any]) -> list[str]:
    """A row's sum has the same bits whatever batch it comes in, and wherever in it; AUTO's choices in order of size."""
    seed = context.shared_seed()
    inputs = [
        rank_input(seed, rank, BATCHES[-1] * width, torch.bfloat16).reshape(-1, width)
        for rank in range(context.world_size)
    ]
    expected = rank_ordered_sum(inputs)
    mine = inputs[context.rank].to(context.device)
    chosen: list[str] = []
    with communicator(context, "AUTO", **settings) as group, poisoned_outputs():
        for rows in BATCHES:
            strategy = str(group.explain((rows, width), torch.bfloat16).strategy)
            chosen += [strategy] if chosen[-1:] != [strategy] else []
            for first in {0, BATCHES[-1] - rows}:
                output = group.all_reduce(mine[first : first + rows])
                assert_same_bits(output, expected[first : first + rows], f"{rows} rows from {first}: {strategy}")
    return chosen
