"""Ranks on several hosts that a network joins: who is where, what can run, which form pays, how it is cut."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import _C, AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.algorithms import network
from llm_allreduce_plugin.algorithms.base import Numerics
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.low_precision_algorithm import algorithm_of
from llm_allreduce_plugin.algorithms.ranges import bytes_in_words
from llm_allreduce_plugin.config import LowPrecisionConfig, WireFormat
from llm_allreduce_plugin.group import cards
from llm_allreduce_plugin.group.cards import RankCard, host_identity
from llm_allreduce_plugin.group.facts import facts_of, reach_of
from llm_allreduce_plugin.group.places import Places
from llm_allreduce_plugin.selection.policy import decide, decide_fused, describe
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.topology.model import NodeTopology
from llm_allreduce_plugin.wire import FORMATS_BETWEEN_HOSTS

S = AllReduceStrategy


def facts(hosts: tuple[int, ...], device: str = "cuda", settings: AllReduceConfig | None = None) -> GroupFacts:
    config = settings or AllReduceConfig()
    card = RankCard.of_rank(config, device)
    found = [dataclasses.replace(card, host=f"host {host}", multiprocessors=132) for host in hosts]
    return facts_of(NodeTopology(), found, config)


TWO_OF_EIGHT = (0,) * 8 + (1,) * 8


@pytest.mark.parametrize(
    ("hosts", "rank", "members", "rail"),
    [
        ((0, 0, 1, 1), 3, (2, 3), (1, 3)),
        ((0, 1, 0, 1), 2, (0, 2), (2, 3)),
        ((0, 1, 2), 1, (1,), (0, 1, 2)),
        ((0, 1, 1, 2, 0, 2), 5, (3, 5), (4, 2, 5)),
    ],
)
def test_places(hosts: tuple[int, ...], rank: int, members: tuple[int, ...], rail: tuple[int, ...]) -> None:
    places = Places.of(hosts, rank)
    assert (places.members, places.rail, places.host) == (members, rail, hosts[rank])
    assert places.members[places.index] == rank == places.rail[places.host]
    assert [places.host_of(peer) for peer in rail] == list(range(len(rail)))


def test_a_host_is_what_nccl_calls_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_HOSTID", "a")
    assert host_identity() == "a"
    monkeypatch.setenv("NCCL_HOSTID", "")
    assert host_identity() != "a"
    assert cards.hosts_of([dataclasses.replace(RankCard.of_rank(AllReduceConfig(), "cpu"), host=h) for h in "bab"]) == (
        0,
        1,
        0,
    )


def test_each_host_needs_as_many_ranks() -> None:
    found = facts((0, 0, 0, 1))
    assert found.transport is Transport.NONE
    assert found.no_transport_reason == (
        "ranks run on 2 hosts, which must have as many each: there are 3 on host 0, 1 on host 1; "
        "no NVLink domain joins them: ranks 0-3: NVML reports no NVLink fabric for this GPU"
    )
    assert facts((0,) * 73 + (1,) * 73).no_transport_reason.startswith(
        "no kernel for 146 ranks on 2 hosts (there are for 72"
    )


@pytest.mark.parametrize("hosts", [TWO_OF_EIGHT, (0, 1), (0, 0, 1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_exact_strategies_run_and_say_what_their_bits_are(hosts: tuple[int, ...], device: str) -> None:
    group = facts(hosts, device)
    assert group.crosses_network and group.local_size == len(hosts) // group.num_hosts
    for strategy in S:
        found = decide(AllReduceConfig(allreduce_strategy=strategy), group, 1 << 20, "bfloat16")
        if strategy is S.NCCL:
            assert found.launch is None and found.numerics == Numerics.ENGINE
            continue
        if strategy is S.LOWPRECISION:  # see below
            continue
        assert found.launch is not None and found.launch.hosts == group.num_hosts
        assert found.launch.exchange is Exchange.FLAGS
        assert found.numerics == Numerics.HOSTS
        assert f"hierarchical over {group.num_hosts} hosts" in found.algorithm or strategy in {
            S.MINLATENCY,
            S.MNNVL,
        }
        assert "inside each host" in str(found)
        fused = decide_fused(AllReduceConfig(allreduce_strategy=strategy), group, 16, 4096, "bfloat16")
        assert fused.launch is None and "inside one host" in fused.reason


@pytest.mark.parametrize("wire", FORMATS_BETWEEN_HOSTS)
@pytest.mark.parametrize("hosts", [TWO_OF_EIGHT, (0, 1), (0, 0, 1, 1, 2, 2), tuple(range(9)) * 2], ids=str)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_low_precision_compresses_between_hosts(hosts: tuple[int, ...], device: str, wire: WireFormat) -> None:
    settings = AllReduceConfig(allreduce_strategy=S.LOWPRECISION, low_precision={"wire_format": wire})
    group = facts(hosts, device)
    found = decide(settings, group, 1 << 26, "bfloat16")
    assert found.strategy is S.LOWPRECISION and not found.is_fallback
    launch = found.launch
    assert launch is not None
    assert (launch.algorithm, launch.hosts, launch.wire_format) == (Algorithm.TWO_SHOT, group.num_hosts, wire)
    assert launch.pieces == 4
    assert found.numerics == Numerics.LOSSY_HOSTS
    assert f"as {wire} between them" in str(found) and "decoded, rounded once" in str(found)
    fused = decide_fused(settings, group, 1 << 14, 4096, "bfloat16")
    assert fused.launch is None and "inside one host" in fused.reason
    fp32 = decide(settings, group, 1 << 26, "float32")
    assert fp32.strategy is S.MINLATENCY and "not float32" in fp32.reason and fp32.numerics == Numerics.HOSTS


@pytest.mark.parametrize("wire", FORMATS_BETWEEN_HOSTS)
def test_low_precision_leaves_to_exact_sums_what_the_model_says(wire: WireFormat) -> None:
    settings = AllReduceConfig(allreduce_strategy=S.LOWPRECISION, low_precision={"wire_format": wire})
    group = facts(TWO_OF_EIGHT)
    least, source = network.compression_pays_from(group, wire, 2)
    assert least is not None and 256 << 10 < least < 8 << 20
    assert "modelled" in source and "not measured" in source
    below = decide(settings, group, (least - 2) // 2, "bfloat16")
    assert (below.strategy, below.is_fallback) == (S.MINLATENCY, False)
    assert f"below {bytes_in_words(least)} the exact" in below.reason and "modelled" in below.reason
    assert decide(settings, group, least // 2 + 1, "bfloat16").strategy is S.LOWPRECISION
    everything = settings.model_copy(update={"low_precision": LowPrecisionConfig(wire_format=wire, min_bytes=0)})
    assert decide(everything, group, 1, "bfloat16").strategy is S.LOWPRECISION
    assert decide(settings, facts(TWO_OF_EIGHT, "cpu"), 1, "bfloat16").strategy is S.LOWPRECISION


def test_where_compression_between_hosts_never_pays_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.host_costs, "compression_pays_from", lambda *_arguments: None)
    settings = AllReduceConfig(allreduce_strategy=S.LOWPRECISION, low_precision={"wire_format": "tq3"})
    decision = decide(settings, facts(TWO_OF_EIGHT), 1 << 26, "bfloat16")
    assert decision.strategy is S.MINLATENCY
    assert decision.reason.startswith("at no size tq3 between hosts is faster than exact sums (")


@pytest.mark.parametrize("algorithm", ["ring", "hierarchical"])
def test_algorithms_of_one_host_say_that_they_are(algorithm: str) -> None:
    settings = AllReduceConfig(allreduce_strategy=S.LOWPRECISION, low_precision={"algorithm": algorithm})
    choice = algorithm_of(settings, facts((0, 0, 1, 1)))
    assert choice.is_fallback and choice.reason.startswith(f"{algorithm} cannot run over a network")
    assert choice.reason in decide(settings, facts((0, 0, 1, 1)), 1 << 26, "bfloat16").reason


def test_one_host_and_one_domain_are_as_before() -> None:
    one = facts((0,) * 8)
    assert not one.crosses_network and one.local_size == 8
    assert decide(AllReduceConfig(), one, 1 << 10, "bfloat16").numerics == Numerics.EXACT
    domain = dataclasses.replace(facts(TWO_OF_EIGHT), fabric=True)
    assert not domain.crosses_network and domain.local_size == 16


def test_two_steps_pay_once_the_network_is_what_takes_time() -> None:
    table = network.table(facts(TWO_OF_EIGHT), 2)
    assert [found.strategy for found in table.ranges] == [S.ONESHOT, S.TWOSHOT]
    assert 64 << 10 < (table.ranges[0].max_bytes or 0) < 512 << 10
    assert "modelled" in table.source and "not measured" in table.source
    assert (network.table(facts((0, 0, 1, 1, 2, 2)), 2).ranges[0].max_bytes or 0) < (
        network.table(facts((0, 0, 1, 1)), 2).ranges[0].max_bytes or 0
    )
    assert [found.strategy for found in network.table(facts((0, 1)), 2).ranges] == [S.ONESHOT]
    assert describe(AllReduceConfig(), facts(TWO_OF_EIGHT)).startswith("ONESHOT to ")


@given(count=st.integers(0, 1 << 26), number=st.integers(1, 4))
def test_pieces_are_the_message(count: int, number: int) -> None:
    found = network.cuts(count, number)
    assert 1 <= len(found) <= number
    assert sum(size for _, size in found) == count
    assert [first for first, _ in found] == [sum(size for _, size in found[:i]) for i in range(len(found))]
    assert len({size for _, size in found[:-1]}) <= 1, "one plan for all but the last"
    assert all(first % network.PIECE_ELEMENTS == 0 for first, _ in found)


@given(
    count=st.integers(0, 1 << 27),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    shape=st.sampled_from([TWO_OF_EIGHT, (0, 1), (0, 0, 0, 1, 1, 1), tuple(range(4)) * 2]),
    device=st.sampled_from(["cuda", "cpu"]),
    strategy=st.sampled_from([S.AUTO, S.ONESHOT, S.TWOSHOT, S.LOWPRECISION]),
    size=st.sampled_from([None, 2 << 20, 32 << 20]),
)
def test_launches_fit_their_slots_and_cover_their_pieces(
    count: int, dtype: str, shape: tuple[int, ...], device: str, strategy: S, size: int | None
) -> None:
    settings = AllReduceConfig(allreduce_strategy=strategy, workspace_bytes=size)
    card = RankCard.of_rank(settings, device)
    found = [dataclasses.replace(card, host=str(host), multiprocessors=132) for host in shape]
    reach = reach_of(NodeTopology(), found, settings)
    if reach.layout is None:
        assert size == 2 << 20 and device == "cuda", "a workspace that is too small"
        return
    assert reach.layout.world_size == reach.facts.local_size
    launch = decide(settings, reach.facts, count, dtype).launch
    assert launch is not None
    two_steps = launch.algorithm is Algorithm.TWO_SHOT
    parts = reach.layout.world_size if two_steps and reach.layout.shared else 1
    assert launch.chunk_vectors * _C.VECTOR_BYTES * parts <= reach.layout.flagged.one_shot_bytes
    assert 1 <= launch.lanes <= reach.layout.lanes and launch.threads % 32 == 0
    assert launch.pieces == len(network.cuts(count, launch.pieces))
    item = torch.empty((), dtype=getattr(torch, dtype)).itemsize
    of_rank = math.ceil(network.cuts(count, launch.pieces)[0][1] / (reach.layout.world_size if two_steps else 1))
    assert launch.rounds * launch.lanes * launch.chunk_vectors * _C.VECTOR_BYTES >= of_rank * item
