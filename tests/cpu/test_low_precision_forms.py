"""LOWPRECISION's algorithms on one set of workspaces: all world sizes and types, mixed, and with a rank missing.

Ranks are threads here: a communicator has one of the algorithms, and what is to be seen is how they follow each other.
"""

from __future__ import annotations

import random

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.runtime.failures import failure_of
from tests.support.cpu_group import CpuGroup
from tests.support.low_precision import ANY_OWNER, DOMAINS, oracle
from tests.support.reference import DTYPES, assert_same_bits, fresh_seed, rank_input, rank_ordered_sum

RING, HIERARCHICAL = _C.RING, _C.HIERARCHICAL
FORMATS = (
    *((wire, torch.bfloat16) for wire in ANY_OWNER),
    (WireFormat.TQ3, torch.float16),
    (WireFormat.FP8, torch.float32),
)
LAYOUTS = pytest.mark.parametrize("shared", (True, False), ids=("shared", "pushed"))


def _check(
    group: CpuGroup, algorithm: int, wire: WireFormat, dtype: torch.dtype, domains: tuple[int, ...] = ()
) -> None:
    for size, chunk in ((1, 1), (3000, 2), (20_001, 2)):
        seed = fresh_seed()
        inputs = [rank_input(seed, rank, size, dtype) for rank in range(group.world_size)]
        expected = oracle(algorithm, inputs, wire, chunk, domains)
        for output in group.all_reduce(algorithm, inputs, wire=wire, chunk=chunk, domains=domains):
            assert_same_bits(output, expected, f"{wire} {dtype} x {size} in chunks of {chunk}, seed {seed}")


@LAYOUTS
@pytest.mark.parametrize("world_size", range(2, 9))
def test_ring(world_size: int, shared: bool) -> None:
    group = CpuGroup(world_size, shared=shared)
    for wire, dtype in FORMATS:
        _check(group, RING, wire, dtype)


@LAYOUTS
@pytest.mark.parametrize("domains", list(DOMAINS.values()), ids=list(DOMAINS))
def test_hierarchical(domains: tuple[int, ...], shared: bool) -> None:
    group = CpuGroup(len(domains), shared=shared)
    for wire, dtype in FORMATS:
        _check(group, HIERARCHICAL, wire, dtype, domains)


@LAYOUTS
@pytest.mark.parametrize("domains", list(DOMAINS.values()), ids=list(DOMAINS))
def test_all_algorithms_share_slots_flags_and_counts(domains: tuple[int, ...], shared: bool) -> None:
    """In any order, of any length, with ranks that come late, across the wrap of the 32-bit count of rounds."""
    seed = fresh_seed()
    generator = random.Random(seed)
    group = CpuGroup(len(domains), shared=shared)
    group.set_rounds(-50)
    for turn in range(25):
        exact, algorithm = generator.choice(
            ((True, _C.TWO_SHOT), (False, _C.TWO_SHOT), (False, RING), (False, HIERARCHICAL))
        )
        wires = tuple(WireFormat) if algorithm == _C.TWO_SHOT else ANY_OWNER
        wire, dtype = generator.choice(wires), generator.choice(DTYPES)
        size = generator.choice((10, 900, 5000, 20_000))
        inputs = [rank_input(seed + turn, rank, size, dtype) for rank in range(len(domains))]
        jitter = generator if generator.random() < 0.5 else None
        if exact:
            expected = rank_ordered_sum(inputs)
            outputs = group.all_reduce(algorithm, inputs, chunk=generator.choice((40, 200)), jitter=jitter)
        else:
            chunk = generator.choice((1, 2))
            expected = oracle(algorithm, inputs, wire, chunk, domains)
            outputs = group.all_reduce(algorithm, inputs, wire=wire, chunk=chunk, domains=domains, jitter=jitter)
        for output in outputs:
            assert_same_bits(output, expected, f"turn {turn}: {algorithm} {wire} {dtype} x {size}, seed {seed}")


@pytest.mark.parametrize("algorithm", (RING, HIERARCHICAL, _C.TWO_SHOT), ids=("ring", "hierarchical", "two-shot"))
def test_no_flag_rests_for_half_the_count(algorithm: int) -> None:
    """Flags are compared by distance: one that rested for 2**31 rounds would be taken for one to come."""
    domains = DOMAINS["3+3"]
    group = CpuGroup(len(domains))
    inputs = [rank_input(3, rank, 9000, torch.bfloat16) for rank in range(len(domains))]
    group.all_reduce(algorithm, inputs, wire=WireFormat.TQ3, domains=domains)
    rounds = group.rounds()
    assert rounds > 1
    assert group.two_shot_flags() == {rounds}


def test_a_missing_rank_is_named() -> None:
    domains = DOMAINS["2+2"]
    inputs = [rank_input(1, rank, 5000, torch.bfloat16) for rank in range(4)]
    # Hierarchical: rank 2 is the counterpart of rank 0, and in the domain of rank 3.
    for algorithm, expected in (
        (RING, {3: "rank 2 in LOWPRECISION/scatter", 1: "rank 2 in LOWPRECISION/gather"}),
        (HIERARCHICAL, {3: "rank 2 in LOWPRECISION/scatter", 0: "rank 2 in LOWPRECISION/exchange"}),
    ):
        group = CpuGroup(4, timeout_s=0.3)
        with pytest.raises(RuntimeError, match="a peer did not arrive in time"):
            group.all_reduce(algorithm, inputs, wire=WireFormat.FP8, domains=domains, ranks=(0, 1, 3))
        for rank, text in expected.items():
            assert text in str(failure_of(group.workspaces[rank])), f"rank {rank}"


@pytest.mark.parametrize(
    "domains",
    [(), (0, 0, 0, 0), (0, 0, 0, 1), (0, 1, 2, 2), (0, 1, 2, 3)],
    ids=str,
)
def test_domains_that_no_kernel_may_be_given(domains: tuple[int, ...]) -> None:
    inputs = [torch.zeros(8, dtype=torch.bfloat16) for _ in range(4)]
    with pytest.raises(RuntimeError, match="invalid argument"):
        CpuGroup(4).all_reduce(HIERARCHICAL, inputs, wire=WireFormat.FP8, domains=domains)
    with pytest.raises(RuntimeError, match="invalid argument"):
        CpuGroup(2).all_reduce(HIERARCHICAL, inputs[:2], wire=WireFormat.FP8, domains=(0, 1))


def test_a_slot_must_hold_a_packet_as_it_is() -> None:
    """The ring's slots do, whatever its format takes."""
    inputs = [torch.zeros(8, dtype=torch.bfloat16) for _ in range(2)]
    group = CpuGroup(2, workspace_bytes=48 << 10)
    assert 512 <= group.layout.flagged.two_shot_bytes < 992
    group.all_reduce(_C.TWO_SHOT, inputs, wire=WireFormat.FP8)
    with pytest.raises(RuntimeError, match="invalid argument"):
        group.all_reduce(RING, inputs, wire=WireFormat.FP8)
