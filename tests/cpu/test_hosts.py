"""CPU ranks as hosts of some ranks each, gloo between them: bits against sums in host order, and what may go wrong."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig, PeerTimeoutError, TensorParallelCommunicator
from llm_allreduce_plugin.algorithms import measured, network
from llm_allreduce_plugin.algorithms.base import Numerics
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.oracle.hosts import compressed_host_sum, host_ordered_sum
from llm_allreduce_plugin.runtime import norm_calls
from tests.conftest import PoolFor
from tests.support.checks import poisoned_memory, poisoned_outputs
from tests.support.forked import forked, left_in_shm, open_files, own_mappings
from tests.support.hosts import communicator, on_host, telling_inputs
from tests.support.marks import slow
from tests.support.reference import (
    DTYPES,
    assert_same_bits,
    bits,
    digest,
    fresh_seed,
    rank_input,
    rank_ordered_sum,
    special_inputs,
)

TWO_OF_TWO = (0, 0, 1, 1)
LAYOUTS = (TWO_OF_TWO, slow((0, 0, 1, 1, 2, 2)), (0, 1), (0, 1, 0, 1), (0, 1, 2))
SIZES = (0, 1, 7, 8, 9, 17, 1023, 70_001, 1_100_003)
STRATEGIES = ("ONESHOT", "TWOSHOT", "AUTO")


def reduce_and_compare(
    context: RankContext,
    group: TensorParallelCommunicator,
    inputs: Sequence[torch.Tensor],
    hosts: Sequence[int],
    what: str,
) -> None:
    mine = inputs[context.rank]
    before = mine.clone()
    with poisoned_outputs():
        output = group.all_reduce(mine)
    assert_same_bits(output, host_ordered_sum(inputs, hosts), what)
    assert torch.equal(bits(mine), bits(before)), f"{what}: the input was written"


def _sizes(context: RankContext, hosts: Sequence[int], seed: int) -> None:
    for strategy in STRATEGIES:
        with communicator(context, hosts, strategy, timeout_s=30) as group:
            assert group.facts.hosts == tuple(hosts)
            assert group.explain((1000,), torch.bfloat16).launch is not None
            for dtype in DTYPES:
                for size in SIZES:
                    what = f"{strategy} {dtype} {size}, hosts {hosts}, {seed=}"
                    inputs = telling_inputs(seed + size, context.world_size, size, dtype)
                    reduce_and_compare(context, group, inputs, hosts, what)
            counts = group.report()["calls"]
            assert "NCCL" not in counts and sum(counts.values()) == len(DTYPES) * len(SIZES), counts


@pytest.mark.parametrize("hosts", LAYOUTS, ids=str)
def test_sizes(cpu_pool: PoolFor, hosts: tuple[int, ...]) -> None:
    cpu_pool(len(hosts)).run(_sizes, hosts, fresh_seed())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_these_inputs_tell_each_fault(dtype: torch.dtype) -> None:
    """Flat order, hosts in another order, host sums that are rounded before they travel: all give other bits."""
    hosts, seed = (0, 0, 1, 1, 2, 2), fresh_seed()
    inputs = telling_inputs(seed, 6, 4096, dtype)
    right = bits(host_ordered_sum(inputs, hosts))
    parts = [sum_of_host(inputs, hosts, host) for host in range(3)]
    faults = {
        "flat": rank_ordered_sum(inputs),
        "swapped": host_ordered_sum(inputs, (2, 2, 1, 1, 0, 0)),
        "ranks swapped": host_ordered_sum([inputs[rank] for rank in (2, 1, 0, 3, 4, 5)], hosts),
    }
    if dtype is not torch.float32:
        faults["early"] = rank_ordered_sum([part.to(dtype) for part in parts])
    for name, wrong in faults.items():
        assert (bits(wrong) != right).any(), f"{name}, {seed=}"
    assert torch.equal(bits(rank_ordered_sum(parts).to(dtype)), right), "sums of sums are what the oracle says"


def sum_of_host(inputs: Sequence[torch.Tensor], hosts: Sequence[int], host: int) -> torch.Tensor:
    return rank_ordered_sum([part.float() for part, where in zip(inputs, hosts, strict=True) if where == host])


def _specials(context: RankContext) -> None:
    for strategy in STRATEGIES:
        with communicator(context, TWO_OF_TWO, strategy, timeout_s=30) as group:
            for dtype in DTYPES:
                inputs = special_inputs(context.world_size, dtype)
                reduce_and_compare(context, group, inputs, TWO_OF_TWO, f"{strategy} {dtype}")
                strided = [part[: 12 * 14].view(12, 14).t() for part in inputs]
                reduce_and_compare(context, group, strided, TWO_OF_TWO, f"{strategy} {dtype}, strided")
                odd = [part[1:] for part in inputs]
                reduce_and_compare(context, group, odd, TWO_OF_TWO, f"{strategy} {dtype}, unaligned")
                output = group.all_reduce(inputs[context.rank])
                zeros = output == 0
                assert not (zeros & output.signbit()).any(), "a zero is +0"


def test_special_values_and_views(cpu_pool: PoolFor) -> None:
    cpu_pool(4).run(_specials)


def _pieces(context: RankContext, hosts: Sequence[int], seed: int) -> list[int]:
    """Whatever the number of pieces, of rounds and the form, the bits are the same."""
    found = []
    size = 300_017
    inputs = telling_inputs(seed, context.world_size, size, torch.bfloat16)
    for strategy in ("ONESHOT", "TWOSHOT"):
        for piece_bytes in (1 << 30, 200_000, 1):
            measured.NETWORK_PIECE_BYTES = piece_bytes
            for workspace in (2 << 20, 8 << 20):
                with communicator(context, hosts, strategy, timeout_s=30, workspace_bytes=workspace) as group:
                    launch = group.explain((size,), torch.bfloat16).launch
                    assert launch is not None
                    found.append(launch.pieces)
                    for turn in range(3):
                        what = f"{strategy}, {launch}, call {turn}, {seed=}"
                        reduce_and_compare(context, group, inputs, hosts, what)
    return found


@pytest.mark.parametrize("hosts", (TWO_OF_TWO, (0, 1)), ids=str)
def test_pieces(cpu_pool: PoolFor, hosts: tuple[int, ...]) -> None:
    before = measured.NETWORK_PIECE_BYTES
    pool = cpu_pool(len(hosts))
    try:
        for found in pool.run(_pieces, hosts, fresh_seed()):
            assert set(found) == {1, 3, 4}
    finally:
        pool.run(_set_piece_bytes, before)


def _set_piece_bytes(_context: RankContext, size: int) -> None:
    measured.NETWORK_PIECE_BYTES = size


def _normed(context: RankContext) -> None:
    """A norm behind it runs in a kernel of its own, with the bits of the same on the sum."""
    rows, hidden = 5, 64
    inputs = [rank_input(9, rank, rows * hidden, torch.bfloat16).view(rows, hidden) for rank in range(4)]
    residual, weight = rank_input(3, 7, rows * hidden, torch.bfloat16).view(rows, hidden), torch.ones(hidden).bfloat16()
    with communicator(context, TWO_OF_TWO, "AUTO", timeout_s=30) as group:
        got = group.all_reduce_residual_rms_norm(inputs[context.rank], residual, weight, 1e-5)
        decision = group.explain_fused((rows, hidden), torch.bfloat16)
        assert decision.launch is None
        assert "only sums inside one host are fused" in decision.reason
        shape = norm_calls.shape_of(inputs[0], residual, 1e-5, 0.0, None, return_norm=False)
        by_hand = norm_calls.engine_then_norm(lambda _: host_ordered_sum(inputs, TWO_OF_TWO), shape, context.device)
        want = by_hand(inputs[0], residual, weight, None)
        assert want.norm_out is not None and got.norm_out is not None
        assert_same_bits(got.residual_out, want.residual_out, "residual")
        assert_same_bits(got.norm_out, want.norm_out, "norm")


def test_a_norm_behind_it(cpu_pool: PoolFor) -> None:
    cpu_pool(4).run(_normed)


# -- compressed between hosts ------------------------------------------------------------------------------------------

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
                for size in COMPRESSED_SIZES:
                    what = f"{wire} {dtype} {size}, hosts {hosts}, {piece_bytes=}, {seed=}"
                    launch = group.explain((size,), dtype).launch
                    assert launch is not None and launch.wire_format == wire
                    piece = network.cuts(size, launch.pieces)[0][1]
                    for inputs in _inputs_between(seed + size, hosts, size, dtype):
                        before = inputs[context.rank].clone()
                        with poisoned_memory():
                            output = group.all_reduce(inputs[context.rank])
                        assert_same_bits(output, compressed_host_sum(inputs, WireFormat(wire), hosts, piece), what)
                        assert torch.equal(bits(inputs[context.rank]), bits(before)), f"{what}: the input was written"
                        assert {digest(output)} == set(context.gather(digest(output))), f"{what}: ranks differ"
            assert set(group.report()["calls"]) == {"LOWPRECISION"}
            group.all_reduce(torch.ones(100))  # fp32 is not compressed
            assert set(group.report()["calls"]) == {"LOWPRECISION", "MINLATENCY"}


@pytest.mark.parametrize("wire", list(WireFormat))
@pytest.mark.parametrize("hosts", ((0, 1), (0, 1, 0, 1), (0, 0, 1, 1, 2, 2)), ids=str)
def test_compressed_between_hosts(cpu_pool: PoolFor, hosts: tuple[int, ...], wire: str) -> None:
    before, pool = measured.NETWORK_PIECE_BYTES, cpu_pool(len(hosts))
    try:
        pool.run(_compressed, hosts, wire, fresh_seed())
    finally:
        pool.run(_set_piece_bytes, before)


@pytest.mark.parametrize("wire", list(WireFormat))
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


def _special_compressed(context: RankContext) -> None:
    """NaN and infinities stay in their packet or their block, a zero is +0, ranks agree."""
    for wire in WireFormat:
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


def _decision(context: RankContext, hosts: Sequence[int], strategy: str) -> tuple[str, str, str]:
    with communicator(context, hosts, strategy, timeout_s=30) as group:
        output = group.all_reduce(torch.full((100,), float(context.rank)))
        assert (output == sum(range(context.world_size))).all()
        decision = group.explain((100,), torch.float32)
        return str(decision.strategy), decision.reason, decision.numerics


def test_who_runs_instead(cpu_pool: PoolFor) -> None:
    for asked, runs in (("MNNVL", "MINLATENCY"), ("UB", "TWOSHOT"), ("MINLATENCY", "MINLATENCY")):
        for strategy, _, numerics in cpu_pool(4).run(_decision, TWO_OF_TWO, asked):
            assert (strategy, "hosts in order" in numerics) == (runs, True)


def test_hosts_of_different_size_have_the_reason(cpu_pool: PoolFor) -> None:
    for strategy, reason, numerics in cpu_pool(3).run(_decision, (0, 0, 1), "AUTO"):
        assert strategy == "NCCL"
        assert reason == (
            "ranks run on 2 hosts, which must have as many each: there are 2 on host 0, 1 on host 1; "
            "no NVLink domain joins them: CPU ranks have no NVLink"
        )
        assert "engine" in numerics


def _cycles(context: RankContext) -> tuple[list[str], int]:
    def one() -> None:
        with communicator(context, TWO_OF_TWO, "TWOSHOT", timeout_s=30) as group:
            group.all_reduce(torch.ones(1000))

    one()
    before = open_files()
    for _ in range(5):
        one()
    deadline = time.monotonic() + 10
    while len(open_files()) > len(before) and time.monotonic() < deadline:
        time.sleep(0.1)
    return own_mappings(), len(open_files()) - len(before)


def test_nothing_is_left_of_a_communicator(cpu_pool: PoolFor) -> None:
    for mappings, files in cpu_pool(4).run(_cycles):
        assert mappings == []
        assert files <= 0


# -- what may go wrong -------------------------------------------------------------------------------------------------

TIMEOUT_S = 3.0
Outcome = tuple[str, int, float, str]


def _until_it_fails(context: RankContext, hosts: Sequence[int], victims: Sequence[int], how: str) -> Outcome:
    """Calls until one raises: its type, whom it names, when after the attack it came, and its text."""
    settings: dict[str, Any] = {"timeout_s": TIMEOUT_S, "first_timeout_s": 20.0, "allreduce_strategy": "TWOSHOT"}
    with on_host(hosts, context):
        group = TensorParallelCommunicator(context.group, context.device, AllReduceConfig(**settings))
    for _ in range(3):
        group.all_reduce(torch.ones(1000))
    if context.rank in victims:
        if how == "stays away":
            time.sleep(TIMEOUT_S + 30)
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    began = time.monotonic()
    try:
        while True:
            group.all_reduce(torch.ones(1000))
    except PeerTimeoutError as error:
        outcome = type(error).__name__, error.peer, time.monotonic() - began, str(error)
    with pytest.raises(PeerTimeoutError):
        group.all_reduce(torch.ones(1000))
    group.close()
    return outcome


@pytest.mark.parametrize("how", ("killed", "stopped", "stays away"))
def test_a_host_that_is_gone_is_named_in_time(how: str) -> None:
    with forked(4, _until_it_fails, TWO_OF_TWO, (2, 3), how, store="tcp") as ranks:
        outcomes = {rank: ranks.value(rank, TIMEOUT_S + 40) for rank in (0, 1)}
        pids = ranks.pids
    for rank, (_, peer, took_s, text) in outcomes.items():
        assert peer == rank + 2, text
        assert f"rank {rank} on host 0 waited" in text and f"for rank {rank + 2} on host 1 in the exchange" in text
        assert took_s < TIMEOUT_S + 5, text
        if how != "stays away":
            assert "nothing was heard" in text, text
        else:
            assert "lives but has not come" in text, text
    assert left_in_shm(pids) == []


def test_one_rank_that_is_gone_ends_both_hosts() -> None:
    """Its own host by the wait there, the others by what that host says."""
    with forked(4, _until_it_fails, TWO_OF_TWO, (3,), "killed", store="tcp") as ranks:
        outcomes = {rank: ranks.value(rank, TIMEOUT_S + 40) for rank in (0, 1, 2)}
    assert outcomes[2][1] == 3
    assert "rank 2 waited" in outcomes[2][3] and "whose process has ended" in outcomes[2][3]
    assert outcomes[1][1] == 3
    for rank in (0, 1, 2):
        assert outcomes[rank][2] < TIMEOUT_S + 5, outcomes[rank]
    assert "rank 0 " in outcomes[0][3]


def _start_without(context: RankContext, absent: int, folder: str) -> str:
    if context.rank == absent:
        time.sleep(8)
        return "was not there"
    try:
        with on_host(TWO_OF_TWO, context):
            context.communicator("AUTO", start_timeout_s=2.0)
    except TimeoutError as error:
        Path(folder, str(context.rank)).write_text(str(error))
        return str(error)
    return "started"


def test_a_host_that_does_not_come_to_the_start(tmp_path: Path) -> None:
    with forked(4, _start_without, 3, str(tmp_path), store="tcp") as ranks:
        texts = [ranks.value(rank, 30) for rank in (0, 1, 2)]
    for text in texts:
        assert "rank 3" in text and "at the start" in text
