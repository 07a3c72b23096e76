"""CPU ranks as hosts, and what they exchange compressed: bits against the oracle, and errors that would be seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin.algorithms import measured, network
from llm_allreduce_plugin.algorithms.base import Numerics
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.oracle.hosts import compressed_host_sum
from llm_allreduce_plugin.runtime.network_wire import Packed
from llm_allreduce_plugin.wire import FORMATS_BETWEEN_HOSTS
from tests.conftest import PoolFor
from tests.support.checks import judges, poisoned_memory
from tests.support.hosts import TWO_OF_TWO, communicator, set_piece_bytes, sum_of_host
from tests.support.reference import (
    assert_same_bits,
    bits,
    digest,
    fresh_seed,
    rank_input,
    rank_ordered_sum,
    special_inputs,
)

_LARGE = {torch.bfloat16: 2.0**20, torch.float16: 2.0**6}


def cancelling_inputs(seed: int, hosts: Sequence[int], size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The first two hosts cancel, and what others have is lost in either, of which each is encoded alone."""
    scales = {0: _LARGE[dtype], 1: -_LARGE[dtype]}
    place = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    alike = [rank_input(seed, place[rank] + 64 * max(0, host - 1), size, dtype) for rank, host in enumerate(hosts)]
    return [part * scales.get(host, 2.0**-10) for part, host in zip(alike, hosts, strict=True)]


def _inputs_between(seed: int, hosts: Sequence[int], size: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    return [
        [rank_input(seed, rank, size, dtype) for rank in range(len(hosts))],
        cancelling_inputs(seed, hosts, size, dtype),
    ]


COMPRESSED_SIZES = (0, 1, 9, 495, 497, 1023, 1025, 4099, 70_001)


def _compressed(context: RankContext, hosts: Sequence[int], wire: str, seed: int) -> None:
    """One codec pass in each direction, whatever the pieces: what a part has behind its end must not reach a scale."""
    for piece_bytes in (1 << 30, 40_000):
        measured.NETWORK_PIECE_BYTES = piece_bytes
        with communicator(context, hosts, "LOWPRECISION", timeout_s=30, low_precision={"wire_format": wire}) as group:
            decision = group.explain((1000,), torch.bfloat16)
            assert decision.strategy == "LOWPRECISION" and decision.numerics == Numerics.LOSSY_HOSTS
            for dtype in (torch.bfloat16, torch.float16):
                for turn, size in enumerate(COMPRESSED_SIZES):
                    what = f"{wire} {dtype} {size}, hosts {hosts}, {piece_bytes=}, {seed=}"
                    launch = group.explain((size,), dtype).launch
                    assert launch is not None and launch.wire_format == wire
                    piece = network.cuts(size, launch.pieces)[0][1]
                    for inputs in _inputs_between(seed + size, hosts, size, dtype):
                        before = inputs[context.rank].clone()
                        with poisoned_memory():
                            output = group.all_reduce(inputs[context.rank])
                        if judges(context, turn):
                            assert_same_bits(output, compressed_host_sum(inputs, WireFormat(wire), hosts, piece), what)
                        assert torch.equal(bits(inputs[context.rank]), bits(before)), f"{what}: the input was written"
                        assert {digest(output)} == set(context.gather(digest(output))), f"{what}: ranks differ"
            assert set(group.report()["calls"]) == {"LOWPRECISION"}
            group.all_reduce(torch.ones(100))  # fp32 is not compressed
            assert set(group.report()["calls"]) == {"LOWPRECISION", "MINLATENCY"}


@pytest.mark.parametrize("wire", FORMATS_BETWEEN_HOSTS)
@pytest.mark.parametrize("hosts", ((0, 1), (0, 1, 0, 1), (0, 0, 1, 1, 2, 2)), ids=str)
def test_compressed_between_hosts(cpu_pool: PoolFor, hosts: tuple[int, ...], wire: str) -> None:
    before, pool = measured.NETWORK_PIECE_BYTES, cpu_pool(len(hosts))
    try:
        pool.run(_compressed, hosts, wire, fresh_seed())
    finally:
        pool.run(set_piece_bytes, before)


@pytest.mark.parametrize("wire", FORMATS_BETWEEN_HOSTS)
def test_these_inputs_tell_each_fault_of_a_compressed_sum(wire: WireFormat) -> None:
    """What could be done otherwise gives other bits on some of the inputs of the test above."""
    hosts, seed, size = (0, 0, 1, 1, 2, 2), fresh_seed(), 4099
    codec, share = CODECS[wire], -(-size // 16) * 8
    told: dict[str, bool] = {}
    for inputs in _inputs_between(seed, hosts, size, torch.bfloat16):
        right = bits(compressed_host_sum(inputs, wire, hosts))
        sums = [sum_of_host(inputs, hosts, host) for host in range(3)]
        decoded = [torch.cat([codec.round_trip(part) for part in one.split(share)]) for one in sums]
        assert torch.equal(bits(rank_ordered_sum(decoded).bfloat16()), right), "sums of decoded parts are what it is"
        encoded = [codec.round_trip(part) for part in inputs]
        faults = {
            "own sum as it is": [sums[0], *decoded[1:]],
            "packets over parts": [codec.round_trip(one) for one in sums],
            "swapped hosts": decoded[::-1],
            "flat": [torch.cat([codec.round_trip(part) for part in rank_ordered_sum(inputs).float().split(share)])],
            "rounded on the way": [one.bfloat16().float() for one in decoded],
            "encoded once more": [codec.round_trip(rank_ordered_sum(decoded))],
            "each rank encoded": [sum_of_host(encoded, hosts, host) for host in range(3)],
        }
        for name, parts in faults.items():
            wrong = bits(rank_ordered_sum(parts).bfloat16())
            told[name] = told.get(name, False) or bool((wrong != right).any())
    assert all(told.values()), (told, seed)


def _pack_all(self: Packed, sums: torch.Tensor, _count: int) -> torch.Tensor:
    return _PACK(self, sums, sums.numel())


def _unpack_swapped(self: Packed, gathered: torch.Tensor, count: int, elements: int) -> torch.Tensor:
    return _UNPACK(self, gathered.view(self.hosts, -1).flip(0).reshape(-1), count, elements)


def _unpack_one(self: Packed, gathered: torch.Tensor, count: int, elements: int) -> torch.Tensor:
    return _UNPACK(self, gathered.view(self.hosts, -1)[:1].repeat(self.hosts, 1).reshape(-1), count, elements)


_PACK, _UNPACK = Packed.pack, Packed.unpack
PLANTED: dict[str, tuple[str, Any]] = {
    "what nobody has written is encoded": ("pack", _pack_all),
    "hosts are swapped": ("unpack", _unpack_swapped),
    "one host counts as all": ("unpack", _unpack_one),
}


def _sees_planted(context: RankContext, name: str, seed: int) -> bool:
    """Whether the comparison of the test above finds it."""
    hosts, found = (0, 0, 1, 1, 2, 2), False
    with (
        mock.patch.object(Packed, *PLANTED[name]),
        communicator(context, hosts, "LOWPRECISION", timeout_s=30) as group,
    ):
        for size in COMPRESSED_SIZES[1:]:
            for inputs in _inputs_between(seed + size, hosts, size, torch.bfloat16):
                with poisoned_memory():
                    output = group.all_reduce(inputs[context.rank])
                want = compressed_host_sum(inputs, WireFormat.FP8, hosts)
                found |= bool((bits(output) != bits(want)).any())
    return found


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_seen(cpu_pool: PoolFor, name: str) -> None:
    assert any(cpu_pool(6).run(_sees_planted, name, fresh_seed()))


def _special_compressed(context: RankContext) -> None:
    """NaN and infinities stay in their packet or their block, a zero is +0, ranks agree."""
    for wire in FORMATS_BETWEEN_HOSTS:
        with communicator(
            context, TWO_OF_TWO, "LOWPRECISION", timeout_s=30, low_precision={"wire_format": wire}
        ) as group:
            for dtype in (torch.bfloat16, torch.float16):
                inputs = special_inputs(context.world_size, dtype)
                strided = [part[: 12 * 14].view(12, 14).t() for part in inputs]
                for parts, what in (
                    (inputs, "whole"),
                    ([part[1:] for part in inputs], "unaligned"),
                    (strided, "strided"),
                ):
                    output = group.all_reduce(parts[context.rank])
                    flat = [part.contiguous() for part in parts]
                    assert_same_bits(output, compressed_host_sum(flat, wire, TWO_OF_TWO), f"{wire} {dtype}, {what}")
                    assert not ((output == 0) & output.signbit()).any(), "a zero is +0"


def test_special_values_compressed(cpu_pool: PoolFor) -> None:
    cpu_pool(4).run(_special_compressed)
