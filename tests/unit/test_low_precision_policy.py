"""When LOWPRECISION compresses, why not where it does not, and whether that is a fallback."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES
from llm_allreduce_plugin.algorithms.decision import Decision
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.config import LowPrecisionConfig, WireFormat
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.runtime.tally import fallback_of
from llm_allreduce_plugin.selection.policy import decide
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.wire import PACKETS
from tests.support.group_facts import facts

S = AllReduceStrategy


def low_precision(count: int, dtype: str, group: GroupFacts, **settings: Any) -> Decision:
    agreed = AllReduceConfig(allreduce_strategy=S.LOWPRECISION, low_precision=LowPrecisionConfig(**settings))
    return decide(agreed, group, count, dtype)


def test_low_precision_runs_where_it_can_and_says_why_not() -> None:
    cpu = facts(transport=Transport.SHM, workspace=4 << 20)
    runs = low_precision(4096, "bfloat16", cpu, wire_format="TQ3")
    assert runs.strategy is S.LOWPRECISION
    assert runs.launch is not None
    assert runs.launch.wire_format is WireFormat.TQ3
    for decision, reason in (
        (low_precision(4096, "float32", cpu), "compression is for bfloat16 and float16, not float32"),
        (
            low_precision(4096, "bfloat16", cpu, min_bytes="1MiB"),
            "messages below 1 MiB stay exact (low_precision.min_bytes)",
        ),
        (low_precision(4096, "float16", dataclasses.replace(cpu, world_size=16)), "for 2 to 8 ranks, not 16"),
    ):
        assert decision.strategy is S.MINLATENCY
        assert reason in decision.reason


def test_what_works_as_documented_is_no_fallback() -> None:
    """Small messages stay exact under LOWPRECISION: as asked for. What cannot run is a fallback, as ever."""
    cpu = facts(transport=Transport.SHM, workspace=4 << 20)
    switched = facts(4, in_band=True)
    for decision in (
        low_precision(4096, "bfloat16", cpu, min_bytes="1MiB"),
        low_precision(4096, "bfloat16", switched),  # below the documented crossover
        low_precision(1, "float16", switched),
    ):
        assert (decision.strategy, decision.by_design, decision.is_fallback) == (S.MINLATENCY, True, False)
        assert decision.runs_another
        assert fallback_of(decision) is None
    large = low_precision(1 << 26, "bfloat16", switched)
    assert (large.strategy, large.by_design, large.runs_another) == (S.LOWPRECISION, False, False)
    for decision in (
        low_precision(4096, "float32", cpu),
        low_precision(4096, "float32", cpu, min_bytes="1MiB"),
        low_precision(4096, "float16", dataclasses.replace(cpu, world_size=16), min_bytes="1MiB"),
        low_precision(4096, "bfloat16", facts(transport=Transport.NONE), min_bytes="1MiB"),
    ):
        assert (decision.by_design, decision.is_fallback) == (False, True)
        assert fallback_of(decision) is not None


def test_compression_runs_where_it_is_faster() -> None:
    """From a measured size on for each kind of memory, scaled to what the links carry."""
    group = facts(4, in_band=True)
    assert low_precision(576 << 10, "bfloat16", group).strategy is S.LOWPRECISION
    small = low_precision((576 << 10) - 1, "bfloat16", group)
    assert small.strategy is S.MINLATENCY
    assert small.reason == "below 1.125 MiB the exact kernels are faster than fp8 (measured on H100)"
    pcie = low_precision(1 << 17, "bfloat16", facts(8, in_band=True, architecture=89))
    assert pcie.strategy is S.LOWPRECISION
    for group, source in (
        (facts(8, in_band=True, architecture=89), "measured on H100 with 4 ranks, scaled by 0.1 for PCIe: an estimate"),
        (facts(4, in_band=True, architecture=100), "measured on H100, scaled by 2.0 for sm_100: an estimate"),
        (facts(8, in_band=True), "measured on H100 with 4 ranks: an estimate"),
        (facts(8, Transport.HOST, architecture=89), "measured on H200 with 4 ranks: an estimate"),
        (facts(4, Transport.HOST, architecture=89), "measured on H200: an estimate"),
        (facts(2, Transport.HOST), "measured on H100"),
    ):
        for count in (100, 1 << 26):
            assert f"({source})" in low_precision(count, "bfloat16", group).reason


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_what_is_compressed_says_from_which_size_on(world_size: int) -> None:
    least = "448 KiB" if world_size == 2 else "1.125 MiB"
    reason = low_precision(1 << 20, "bfloat16", facts(world_size, in_band=True)).reason
    words = f"2 MiB are at least {least}, from which on fp8 is faster than exact sums (measured on H100"
    assert reason.startswith(f"allreduce_strategy is LOWPRECISION; {words}")
    set_ = low_precision(1 << 20, "bfloat16", facts(world_size, in_band=True), min_bytes="64K").reason
    assert "2 MiB are at least 64 KiB (low_precision.min_bytes)" in set_
    cpu = low_precision(1 << 20, "bfloat16", facts(world_size, Transport.SHM))
    assert "CPU ranks compress everything" in cpu.reason


def test_compression_runs_where_it_is_faster_through_host_memory() -> None:
    host = facts(4, Transport.HOST, workspace=12 << 20)
    assert low_precision(48 << 10, "bfloat16", host).strategy is S.LOWPRECISION
    assert low_precision((48 << 10) - 1, "bfloat16", host).strategy is S.MINLATENCY
    assert low_precision(8, "bfloat16", host, min_bytes=0).strategy is S.LOWPRECISION


@pytest.mark.parametrize("transport", [Transport.SYMMETRIC, Transport.HOST])
@pytest.mark.parametrize("wire", [wire for wire in WireFormat if not wire.keeps_rows])
def test_a_format_without_a_size_is_refused_with_its_own_reason(
    transport: Transport, wire: WireFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody has measured it, at every size; not with the number or the words of another kind of memory."""
    group = facts(4, transport, workspace=12 << 20, in_band=wire.goes_in_band)
    counts = (1, 1 << 12, 1 << 27)
    assert low_precision(counts[-1], "bfloat16", group, wire_format=wire).strategy is S.LOWPRECISION, "it is listed"
    monkeypatch.delitem(measured.LOW_PRECISION_PAYS_FROM, (transport, wire))
    for count in counts:
        decision = low_precision(count, "bfloat16", group, wire_format=wire)
        assert (decision.strategy, decision.by_design, decision.is_fallback) == (S.MINLATENCY, True, False)
        assert decision.reason == (
            f"from which size on {wire} is faster than exact sums is not known: "
            f"{wire} was not measured over {transport} memory"
        )
    assert low_precision(1, "bfloat16", group, wire_format=wire, min_bytes=0).strategy is S.LOWPRECISION
    cpu = facts(4, Transport.SHM, workspace=4 << 20)
    assert low_precision(1, "bfloat16", cpu, wire_format=wire).strategy is S.LOWPRECISION


@given(st.integers(0, 1 << 26), st.sampled_from(list(WireFormat)), st.integers(2, 8), st.integers(1 << 19, 1 << 24))
def test_low_precision_launches_fit_their_slots(count: int, wire: WireFormat, world_size: int, workspace: int) -> None:
    group = facts(world_size, transport=Transport.SHM, workspace=workspace)
    launch = low_precision(count, "bfloat16", group, wire_format=wire).launch
    assert launch is not None
    codec = CODECS[wire]
    packet_vectors = codec.packet_bytes // VECTOR_BYTES
    assert launch.chunk_vectors % packet_vectors == 0
    chunk = launch.chunk_vectors // packet_vectors
    assert 1 <= chunk <= group.flagged.two_shot // codec.packet_bytes
    per_round = chunk * world_size * codec.packet_values
    assert launch.rounds * per_round >= count
    assert (launch.rounds - 1) * per_round < max(count, 1)


@pytest.mark.parametrize(
    ("world_size", "mib", "lanes", "chunk"),
    (
        (2, 1, 32, 8),  # a packet to a warp, in one block to a multiprocessor
        (2, 4, 128, 8),
        (2, 8, 256, 8),
        (2, 64, 264, 8),  # rounds
        (4, 1, 64, 2),  # a packet for each of three peers: six of eight warps
        (4, 4, 128, 4),
        (4, 8, 256, 4),
        (4, 16, 256, 8),
        (4, 64, 264, 8),
        (8, 1, 64, 1),
        (8, 4, 256, 1),
    ),
)
def test_packets_by_flags_over_fast_links(world_size: int, mib: int, lanes: int, chunk: int) -> None:
    group = facts(world_size, workspace=384 << 20)
    launch = low_precision(mib << 19, "bfloat16", group, wire_format="TQ3", min_bytes=0).launch
    assert launch is not None
    packet = PACKETS[WireFormat.TQ3]
    packets = math.ceil((mib << 19) / world_size / packet.values)
    assert (math.ceil(packets / chunk) if launch.rounds == 1 else launch.lanes) == lanes
    assert launch.chunk_vectors == chunk * packet.bytes // VECTOR_BYTES
    assert launch.rounds == math.ceil(packets / chunk / launch.lanes)


def test_cpu_ranks_take_as_few_rounds_as_their_slots_allow() -> None:
    cpu = facts(2, Transport.SHM, workspace=4 << 20)
    launch = low_precision(1 << 16, "bfloat16", cpu, wire_format="TQ3").launch
    assert launch is not None
    assert (launch.lanes, launch.rounds) == (1, 1)
