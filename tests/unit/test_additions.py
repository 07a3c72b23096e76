"""What a new strategy needs: one class, and its place in the list. All else follows, as these tests show with one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from typer.testing import CliRunner

from llm_allreduce_plugin import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.algorithms.base import KernelStrategy, Merit, Message, Numerics, spread
from llm_allreduce_plugin.algorithms.decision import Algorithm, Epilogue, Exchange, Launch
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.strategies import ASKED_FOR, STRATEGIES, TableStrategy
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.group.capabilities import cpu_facts
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.profiles.entry import Kernel, Placing
from llm_allreduce_plugin.runtime.tally import Made, Tally
from llm_allreduce_plugin.selection.policy import decide, describe, uses_table
from llm_allreduce_plugin.selection.sweep import sweep
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.wire import PACKETS
from tests.support.cpu_group import CpuGroup
from tests.support.reference import assert_same_bits, rank_ordered_sum

S = AllReduceStrategy
KINDS = Path(__file__).parents[2] / "csrc" / "include" / "llm_allreduce" / "kinds.h"
PAYS_FROM = 64 << 10
LARGEST_CHUNK_BYTES = 4096


class Added(KernelStrategy):
    """Through CPU ranks' memory, of whole vectors only, and not worth it for small messages."""

    name = S.UB
    numerics = Numerics.EXACT
    algorithm = "a strategy that a test adds"
    instead = (S.TWOSHOT, S.NCCL)

    def obstacle(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> str | None:
        if message.payload_bytes % 16:
            return "part of a vector"
        return super().obstacle(config, facts, message)

    def pays(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Merit:
        if message.payload_bytes < PAYS_FROM:
            return Merit(pays=False, reason="too small for it")
        return Merit(pays=True, reason="large enough for it")

    def plan(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Launch:
        return spread(message.vectors, Algorithm.TWO_SHOT, LARGEST_CHUNK_BYTES, facts.lanes, facts.world_size)


@pytest.fixture
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, S.UB, Added())


@pytest.mark.usefixtures("_added")
def test_it_is_decided_by_what_it_says_of_itself() -> None:
    config, facts = AllReduceConfig(allreduce_strategy=S.UB), cpu_facts(3)
    runs = decide(config, facts, PAYS_FROM // 2, "bfloat16")
    assert (runs.strategy, runs.reason) == (S.UB, "allreduce_strategy is UB; large enough for it")
    assert (runs.algorithm, runs.is_fallback) == (Added.algorithm, False)
    small = decide(config, facts, 8, "bfloat16")
    assert (small.strategy, small.reason, small.by_design) == (S.TWOSHOT, "too small for it", True)
    odd = decide(config, facts, PAYS_FROM // 2 + 1, "bfloat16")
    assert (odd.strategy, odd.reason, odd.is_fallback) == (S.TWOSHOT, "part of a vector", True)
    integers = decide(config, facts, PAYS_FROM, "int8")
    assert integers.strategy is S.NCCL
    other = decide(AllReduceConfig(allreduce_strategy=S.ONESHOT), facts, PAYS_FROM, "bfloat16")
    assert {passed.strategy: passed.reason for passed in other.passed_over}[S.UB] == "allreduce_strategy is ONESHOT"
    assert not uses_table(config)


@pytest.mark.usefixtures("_added")
def test_it_is_swept_described_counted_and_explained() -> None:
    config, facts = AllReduceConfig(allreduce_strategy=S.UB), cpu_facts(3)
    ranges = sweep(config, facts, "float32")
    assert ranges[0].name == "TWOSHOT"
    assert any(found.first_bytes == PAYS_FROM and found.name == "UB" for found in ranges)
    assert describe(config, facts) == "TWOSHOT to 32 KiB, then UB"
    tally = Tally()
    tally.add(decide(config, facts, PAYS_FROM, "float32"), Made(calls=3))
    assert dict(tally.counts().calls) == {"UB": 3}
    result = CliRunner().invoke(app, ["explain", "--cpu", "--strategy", "ub", "--bytes", "64K"])
    assert f"UB: {Added.algorithm}" in result.output


@pytest.mark.usefixtures("_added")
def test_its_launch_runs() -> None:
    """As planned, on ranks that are threads: the sum in rank order."""
    count = 3 * PAYS_FROM // 4 + 8
    launch = decide(AllReduceConfig(allreduce_strategy=S.UB), cpu_facts(3), count, "float32").launch
    assert launch is not None
    assert launch.rounds > 1
    inputs = [torch.randn(count, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    outputs = CpuGroup(3).all_reduce(launch.algorithm, inputs, exchange=launch.exchange, chunk=launch.chunk_vectors)
    for output in outputs:
        assert_same_bits(output, rank_ordered_sum(inputs), "of the added strategy")


# -- what stands in two places is the same -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("enum", "prefix"), [(Algorithm, "lar_algorithm"), (Exchange, "lar_exchange"), (Epilogue, "lar_epilogue")]
)
def test_numbers_are_those_of_the_header(enum: type[Algorithm | Exchange | Epilogue], prefix: str) -> None:
    body = re.search(rf"typedef enum {prefix} {{(.*?)}} {prefix};", KINDS.read_text(), flags=re.DOTALL)
    assert body is not None
    found = {name: int(number) for name, number in re.findall(r"LAR_(\w+) = (\d+)", body[1])}
    assert found == {member.name: int(member) for member in enum}


def test_every_strategy_can_be_asked_for_and_ends_with_the_engines_own() -> None:
    assert set(ASKED_FOR) == set(S)
    for name, strategy in ASKED_FOR.items():
        assert strategy.name is name
        assert [*strategy.candidates(AllReduceConfig(), cpu_facts(2), Message(8, "float32", 4)), *strategy.instead][
            -1
        ] is S.NCCL
        assert set(strategy.instead) <= set(STRATEGIES)


def test_tables_and_profiles_name_the_same_kernels() -> None:
    """Of one numeric class: no table can change an answer's bits."""
    for strategy in ASKED_FOR.values():
        if isinstance(strategy, TableStrategy):
            assert set(strategy.among) == set(get_args(Kernel))
            assert {kernel.numerics for kernel in strategy.among.values()} == {strategy.numerics}
            assert STRATEGIES[S.UB].numerics is strategy.numerics
    assert set(get_args(Placing)) == {*get_args(Kernel), S.UB}


def test_a_wire_format_is_known_everywhere_by_its_name() -> None:
    assert set(PACKETS) == set(CODECS) == set(WireFormat)
    for wire, packet in PACKETS.items():
        codec = CODECS[wire]
        assert (codec.code, codec.packet_values, codec.packet_bytes) == (packet.code, packet.values, packet.bytes)
        assert 0 < codec.most_error <= 1
        settings = {"wire_format": str(wire), "min_bytes": 0}
        decision = decide(
            AllReduceConfig(allreduce_strategy=S.LOWPRECISION, low_precision=settings),  # type: ignore[arg-type]
            cpu_facts(2),
            4096,
            "bfloat16",
        )
        assert decision.launch is not None
        assert decision.launch.wire_code == packet.code
        for command in ("bench", "explain"):
            assert str(wire) in CliRunner().invoke(app, [command, "--help"]).output
    assert cpu_facts(2).transport is Transport.SHM
