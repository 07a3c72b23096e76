"""CPU ranks as hosts of some ranks each, gloo between them: bits against sums in host order, and what may go wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig, PeerTimeoutError, TensorParallelCommunicator
from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.oracle.hosts import host_ordered_sum
from llm_allreduce_plugin.runtime import norm_calls
from tests.conftest import PoolFor
from tests.support.checks import poisoned_outputs
from tests.support.forked import forked, left_in_shm, open_files, own_mappings
from tests.support.hosts import TWO_OF_TWO, communicator, on_host, set_piece_bytes, sum_of_host, telling_inputs
from tests.support.marks import slow
from tests.support.reference import (
    DTYPES,
    assert_same_bits,
    bits,
    fresh_seed,
    rank_input,
    rank_ordered_sum,
    special_inputs,
)

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
    """All strategies sum the same inputs, which take longer to make than to sum."""
    with contextlib.ExitStack() as stack:
        groups = {
            strategy: stack.enter_context(communicator(context, hosts, strategy, timeout_s=30))
            for strategy in STRATEGIES
        }
        for group in groups.values():
            assert group.facts.hosts == tuple(hosts)
            assert group.explain((1000,), torch.bfloat16).launch is not None
        for dtype in DTYPES:
            for size in SIZES:
                inputs = telling_inputs(seed + size, context.world_size, size, dtype)
                for strategy, group in groups.items():
                    what = f"{strategy} {dtype} {size}, hosts {hosts}, {seed=}"
                    reduce_and_compare(context, group, inputs, hosts, what)
        for group in groups.values():
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
        pool.run(set_piece_bytes, before)


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
