"""Inputs that peers read in place: the policy says so, whatever cannot be read is sent, and both are counted apart."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_allreduce_plugin import AllReduceConfig, AllReduceStrategy, NodeTopology
from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES
from llm_allreduce_plugin.algorithms.decision import Algorithm, Decision, Exchange, Launch
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.group.capabilities import group_facts
from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator
from llm_allreduce_plugin.runtime.planner import Planner
from llm_allreduce_plugin.runtime.plans import Planned
from llm_allreduce_plugin.runtime.tally import Made, Tally
from llm_allreduce_plugin.selection.policy import decide
from llm_allreduce_plugin.selection.sweep import sweep
from llm_allreduce_plugin.transport.peer_visible import PeerVisibleBuffer
from tests.support.group_facts import any_facts, facts

S = AllReduceStrategy
TOPOLOGY = Path(__file__).parents[2] / "configs" / "topologies" / "h100_x8_nvswitch.json"
MIB = 1 << 20


def launch_of(strategy: S, group: GroupFacts, count: int, dtype: str = "bfloat16", **where: bool) -> Launch | None:
    return decide(AllReduceConfig(allreduce_strategy=strategy), group, count, dtype, **where).launch


def test_two_shot_pulls_what_it_would_push() -> None:
    group = facts(4, in_band=True)
    for strategy in (S.TWOSHOT, S.MINLATENCY, S.AUTO, S.UB):
        pushed = launch_of(strategy, group, MIB)
        pulled = launch_of(strategy, group, MIB, readable_in_place=True)
        assert pushed is not None
        assert pulled is not None
        assert (pushed.exchange, pulled.exchange) == (Exchange.PUSH, Exchange.PULL)
        assert (pulled.scatter_lanes, pulled.drain_lanes) == (0, 0)
        assert (pulled.lanes, pulled.chunk_vectors, pulled.rounds) == (
            pushed.lanes,
            pushed.chunk_vectors,
            pushed.rounds,
        )
    small = launch_of(S.AUTO, group, 1024, readable_in_place=True)
    assert small is not None
    assert small.exchange is Exchange.PUSH, "one step is faster than two, also than two of which one reads"


@given(st.sampled_from(list(S)), any_facts, st.integers(0, 1 << 28), st.sampled_from([*ELEMENT_BYTES, "int8"]))
def test_only_what_can_be_read_is_pulled(strategy: S, group: GroupFacts, count: int, dtype: str) -> None:
    sent = launch_of(strategy, group, count, dtype)
    launch = launch_of(strategy, group, count, dtype, readable_in_place=True)
    assert sent is None or sent.exchange is not Exchange.PULL
    whole = count > 0 and count * ELEMENT_BYTES.get(dtype, 0) % VECTOR_BYTES == 0
    exact = sent is not None and sent.algorithm is Algorithm.TWO_SHOT and sent.wire_format is None
    pulls = whole and exact and sent is not None and sent.exchange is Exchange.PUSH
    assert (launch is not None and launch.exchange is Exchange.PULL) == pulls
    assert pulls or launch == sent


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_buffer_holds_only_what_starts_and_ends_on_a_vector(dtype: torch.dtype) -> None:
    """All else is sent: the call for it is that of any other tensor."""
    storage = torch.zeros(4096, dtype=torch.uint8)
    buffer = PeerVisibleBuffer(storage, (0, 4096), None)
    values = storage.view(dtype)
    to_a_vector = VECTOR_BYTES // dtype.itemsize
    assert buffer.holds(values)
    assert buffer.holds(values[to_a_vector : 3 * to_a_vector])
    assert not buffer.holds(values[1 : 1 + to_a_vector]), "starts within a vector"
    assert not buffer.holds(values[: to_a_vector + 1]), "ends within a vector"
    assert not buffer.holds(values[::2])
    assert not buffer.holds(torch.zeros(to_a_vector, dtype=dtype))


class Recording(Planner):
    """Notes down what it would launch: exchange, elements and distances to peers' inputs."""

    def __init__(self, config: AllReduceConfig, group: GroupFacts, buffer: PeerVisibleBuffer) -> None:
        cpu = torch.device("cpu")
        super().__init__(config, group, 1, cpu, torch.clone, workspace=None, health=None, checker=None)
        self.buffers.append(buffer)
        self.made: list[tuple[Exchange, int, tuple[int, ...]]] = []

    def _kernel_call(
        self, decision: Decision, count: int, dtype: torch.dtype, peer_distances: Sequence[int] = ()
    ) -> Planned:
        assert decision.launch is not None
        self.made.append((decision.launch.exchange, count, tuple(peer_distances)))
        exchange = decision.launch.exchange
        return Planned(decision, lambda x: torch.full_like(x, exchange), Made())


class Communicator(TensorParallelCommunicator):
    """One without ranks."""

    def __init__(self, group: GroupFacts, strategy: S, buffer: PeerVisibleBuffer) -> None:
        self.config = AllReduceConfig(allreduce_strategy=strategy)
        self.facts, self.device = group, torch.device("cpu")
        self._planner = self.recording = Recording(self.config, group, buffer)
        self._plans, self._peer_visible = self._planner.plans, self._planner.buffers

    @property
    def made(self) -> list[tuple[Exchange, int, tuple[int, ...]]]:
        return self.recording.made


def test_ranks_of_several_hosts_get_an_ordinary_tensor() -> None:
    """They do not map each other's memory: nothing is opened, for which all of them would have to be there."""
    for fabric in (False, True):
        hosts = dataclasses.replace(facts(4, in_band=True), hosts=(0, 0, 1, 1), fabric=fabric)
        group = Communicator(hosts, S.TWOSHOT, PeerVisibleBuffer(torch.zeros(16, dtype=torch.uint8), (0,) * 4, None))
        assert group.peer_visible_empty((3, 40), torch.float32).shape == (3, 40)
        assert len(group._planner.buffers) == 1


def test_the_communicator_pulls_what_it_may_and_sends_the_rest() -> None:
    """Misaligned inputs, parts of a vector, small ones and those that lie elsewhere are sent, and do not fail."""
    storage = torch.zeros(4 * MIB, dtype=torch.uint8)
    values = storage.view(torch.float32)
    group = Communicator(facts(4, in_band=True), S.AUTO, PeerVisibleBuffer(storage, (0, 64, 128, 192), None))
    large = 1 << 18
    for input_, exchange in (
        (values[:large], Exchange.PULL),
        (values[4 : 4 + large], Exchange.PULL),
        (values[1 : 1 + large], Exchange.PUSH),
        (values[: large + 1], Exchange.PUSH),
        (values[:1024], Exchange.PUSH),
        (values[: 2 * large : 2], Exchange.PUSH),
        (values[:0], Exchange.PUSH),
        (torch.zeros(large), Exchange.PUSH),
    ):
        for _ in range(2):  # planned, and kept
            output = group.all_reduce(input_)
            assert output.shape == input_.shape
            assert (output == exchange).all()
    pulled = [(count, distances) for exchange, count, distances in group.made if exchange is Exchange.PULL]
    assert pulled == [(large, (0, 64, 128, 192))], "one plan for all inputs of a size in a buffer"
    assert all(not distances for exchange, _, distances in group.made if exchange is not Exchange.PULL)
    assert len(group.made) == len({(exchange, count) for exchange, count, _ in group.made}), "each is planned once"
    asked = group.explain((large,), torch.float32, readable_in_place=True).launch
    assert asked is not None
    assert asked.exchange is Exchange.PULL


def test_pulled_calls_are_counted_by_name() -> None:
    group, tally = facts(4, in_band=True), Tally()
    for place, calls in ((False, 2), (True, 5)):
        settings = AllReduceConfig(allreduce_strategy=S.UB, registered_pool=0)
        decision = decide(settings, group, MIB, "bfloat16", readable_in_place=place)
        tally.add(decision, Made(calls=calls))
    counts = tally.counts()
    assert dict(counts.calls) == {"TWOSHOT": 2, "TWOSHOT (pull)": 5}
    assert {(found.requested, found.strategy): calls for found, calls in counts.fallbacks.items()} == {
        ("UB", "TWOSHOT"): 7
    }, "the same fallback, wherever inputs lie"


def explained(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["explain", "--topology", str(TOPOLOGY), "--tp", "4", "--in-place", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.output) if "--json" in arguments else result.output


def test_explain_says_whether_peers_read_the_input() -> None:
    assert "in band, peers read the input in place" in explained("--bytes", "1M")
    assert "the input is sent" not in explained("--bytes", "1M")
    for arguments, reason in (
        (("--bytes", "1000002"), "1000002 bytes are no whole vectors of 16 bytes"),
        (("--bytes", "4K"), "only for an exact two-shot"),
        (("--bytes", "8M", "--transport", "host"), "only what would be pushed in band, through GPU memory"),
        (("--strategy", "NCCL"), "NCCL runs the engine's own all-reduce, which reads no input in place"),
    ):
        text = explained(*arguments)
        assert "the input is sent: " in text
        assert reason in text
    document = explained("--bytes", "1M", "--json")
    assert document["decision"]["launch"]["exchange"] == "PULL"
    assert (document["message"]["readable_in_place"], document["message"]["why_sent"]) == (True, None)


def test_a_sweep_names_it() -> None:
    assert "TWOSHOT (pull)" in explained("--sweep")
    group = group_facts(NodeTopology.from_json(TOPOLOGY), 4)
    ranges = sweep(AllReduceConfig(), group, "bfloat16", readable_in_place=True)
    assert [found.name for found in ranges][:2] == ["ONESHOT", "TWOSHOT (pull)"]
    for before, after in itertools.pairwise(ranges):
        assert after.first_bytes == before.last_bytes + VECTOR_BYTES
        assert after.first_bytes % VECTOR_BYTES == 0
