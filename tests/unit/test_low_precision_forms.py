"""Which of LOWPRECISION's algorithms runs: total, deterministic, with a reason, and launches that fit their slots."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import AllReduceConfig, AllReduceStrategy, ConfigError, NodeTopology, load_config
from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES
from llm_allreduce_plugin.algorithms.decision import Algorithm, Decision, Launch
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.low_precision_algorithm import (
    AlgorithmChoice,
    algorithm_of,
    domains_obstacle,
    unit_bytes,
)
from llm_allreduce_plugin.algorithms.ranges import bytes_in_words
from llm_allreduce_plugin.config import LowPrecisionAlgorithm, LowPrecisionConfig, WireFormat
from llm_allreduce_plugin.group import cards
from llm_allreduce_plugin.group.capabilities import group_facts
from llm_allreduce_plugin.group.facts import facts_of, gpus_of
from llm_allreduce_plugin.selection.policy import decide
from llm_allreduce_plugin.topology import nvml
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.wire import PACKETS
from tests.support.group_facts import any_facts, facts
from tests.support.launches import owned_vectors
from tests.support.low_precision import DOMAINS
from tests.unit.test_agreement import card

S, A = AllReduceStrategy, LowPrecisionAlgorithm
FOLDER = Path(__file__).parents[2] / "configs" / "topologies"
NUMA = DOMAINS["4+4"]


def config(**settings: Any) -> AllReduceConfig:
    return AllReduceConfig(allreduce_strategy=S.LOWPRECISION, low_precision=LowPrecisionConfig(**settings))


def low_precision(group: GroupFacts, count: int = 1 << 24, **settings: Any) -> Decision:
    return decide(config(**settings), group, count, "bfloat16")


def chosen(group: GroupFacts, **settings: Any) -> AlgorithmChoice:
    return algorithm_of(config(**settings), group)


def pcie(transport: Transport = Transport.SYMMETRIC, **changes: Any) -> GroupFacts:
    """Eight PCIe GPUs in two NUMA nodes."""
    group = facts(8, transport, architecture=89)
    return dataclasses.replace(group, **{"nvlink": False, "domains": NUMA, **changes})


def test_auto_is_hierarchical_over_numa_nodes_without_nvlink() -> None:
    decision = low_precision(pcie())
    assert decision.launch is not None
    assert decision.launch.algorithm is Algorithm.HIERARCHICAL
    assert decision.launch.domains == NUMA
    assert decision.algorithm.startswith("hierarchical push")
    assert decision.reason.endswith("hierarchical: without NVLink, ranks in two domains of 4 (NUMA nodes)")
    assert "domains (0, 0, 0, 0, 1, 1, 1, 1)" in str(decision)


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (pcie(nvlink=True), "NVLink seems to join all GPUs"),
        (pcie(domains=()), "the NUMA node of every rank's GPU is not known (set low_precision.domains)"),
        (pcie(domains=(0,) * 8), "ranks form 1 domain of 8 ranks, not two of equal size with 2 to 4 ranks each"),
        (pcie(domains=(0, 1, 1, 1, 1, 1, 1, 1)), "ranks form 2 domains of 1, 7 ranks, not two of equal size"),
        (pcie(domains=(0, 0, 1, 1, 2, 2, 3, 3)), "ranks form 4 domains of 2, 2, 2, 2 ranks, not two"),
        (facts(8, Transport.SHM), "hierarchical is for GPUs"),
    ],
)
def test_auto_is_two_shot_elsewhere_and_says_why(group: GroupFacts, reason: str) -> None:
    decision = low_precision(group)
    assert decision.launch is not None
    assert decision.launch.algorithm is Algorithm.TWO_SHOT
    assert f"two_shot rather than hierarchical: {reason}" in decision.reason
    assert not chosen(group).is_fallback


def test_domains_may_be_given_by_hand() -> None:
    hidden = pcie(domains=())
    assert chosen(hidden, domains=DOMAINS["4+4 in turns"]).domains == DOMAINS["4+4 in turns"]
    assert "(low_precision.domains)" in low_precision(hidden, domains=NUMA).reason
    # What is given wins over what is seen.
    assert chosen(pcie(), domains=(0,) * 8).algorithm is A.TWO_SHOT
    # By hand and by name also with NVLink, and on CPU ranks.
    for group in (pcie(nvlink=True), facts(8, Transport.SHM)):
        by_hand = low_precision(group, algorithm="hierarchical", domains=NUMA)
        assert by_hand.launch is not None
        assert by_hand.launch.algorithm is Algorithm.HIERARCHICAL
        assert by_hand.reason.endswith("low_precision.algorithm is hierarchical")


def test_what_cannot_be_hierarchical_stays_compressed() -> None:
    decision = low_precision(facts(2), algorithm="hierarchical", domains=(0, 1))
    assert decision.strategy is S.LOWPRECISION
    assert decision.launch is not None
    assert decision.launch.algorithm is Algorithm.TWO_SHOT
    assert "hierarchical cannot run: ranks form 2 domains of 1, 1 ranks" in decision.reason
    assert chosen(facts(2), algorithm="hierarchical").is_fallback


def test_two_gpus_take_one_step() -> None:
    for group in (facts(2, in_band=True), facts(2, Transport.HOST)):
        decision = low_precision(group, 1 << 17, min_bytes=0)
        assert decision.launch is not None
        assert (decision.launch.algorithm, decision.launch.wire_format) == (Algorithm.ONE_SHOT, WireFormat.FP8)
        assert decision.launch.in_band
        assert decision.launch.rounds == 1
        assert "one_shot: with 2 ranks, one step sends no more than two" in decision.reason
        # By name, what was asked for.
        by_name = low_precision(group, 1 << 17, min_bytes=0, algorithm="two_shot").launch
        assert by_name is not None
        assert by_name.algorithm is Algorithm.TWO_SHOT
    # Through host memory only as far as it was faster.
    large = low_precision(facts(2, Transport.HOST)).launch
    assert large is not None
    assert (large.algorithm, large.in_band) == (Algorithm.TWO_SHOT, False)
    # A message of many packets has rounds of equal length.
    rounds = low_precision(facts(2, in_band=True, workspace=1 << 20), 1 << 22, min_bytes=0).launch
    assert rounds is not None
    assert rounds.algorithm is Algorithm.ONE_SHOT
    assert rounds.rounds > 1


@pytest.mark.parametrize("settings", [{}, {"algorithm": "one_shot"}])
def test_words_and_reason_are_those_of_the_launch(settings: dict[str, Any]) -> None:
    """Through host memory one step is for small messages, which the decision says of a large one."""
    host = facts(2, Transport.HOST)
    small = low_precision(host, 1 << 19, min_bytes=0, **settings)
    assert small.algorithm == "one-shot, compressed on the wire"
    large = low_precision(host, (1 << 19) + 1, min_bytes=0, **settings)
    assert large.launch is not None
    assert large.launch.algorithm is Algorithm.TWO_SHOT
    assert large.algorithm == "two-shot push, compressed on the wire"
    assert "two_shot: through host memory one step is for messages up to 1 MiB" in large.reason
    assert "rounds once less" not in large.reason


def test_slots_may_be_smaller_than_what_one_step_is_for() -> None:
    """Then they are the limit that is named."""
    host = facts(2, Transport.HOST)
    narrow = dataclasses.replace(host, in_band=dataclasses.replace(host.in_band, one_shot=10 * 528 + 1))
    packet = PACKETS[WireFormat.FP8]
    most = (10 * 528 + 1) // packet.bytes * packet.values
    for count, algorithm in ((most, Algorithm.ONE_SHOT), (most + 1, Algorithm.TWO_SHOT)):
        launch = low_precision(narrow, count, min_bytes=0).launch
        assert launch is not None
        assert launch.algorithm is algorithm
    assert f"up to {bytes_in_words(most * 2)}" in low_precision(narrow, most + 1, min_bytes=0).reason


@pytest.mark.parametrize(
    ("group", "settings", "reason"),
    [
        (facts(4), {"wire_format": "tq3"}, "one step is for fp8 and fp8_group, not tq3"),
        (facts(2, Transport.SHM), {}, "one step is for GPUs"),
        (facts(4), {}, "a slot of the workspace (0 bytes, in band) is smaller than 512 bytes"),
    ],
)
def test_one_step_cannot_run_everywhere(group: GroupFacts, settings: dict[str, Any], reason: str) -> None:
    decision = low_precision(group, algorithm="one_shot", min_bytes=0, **settings)
    assert decision.launch is not None
    assert decision.launch.algorithm is Algorithm.TWO_SHOT
    assert f"one_shot cannot run: {reason}" in decision.reason
    assert chosen(group, algorithm="one_shot", **settings).is_fallback


def test_one_step_can_be_asked_for_with_more_ranks() -> None:
    decision = low_precision(facts(8, in_band=True), 4096, algorithm="ONE_SHOT", min_bytes=0)
    assert decision.launch is not None
    assert decision.launch.algorithm is Algorithm.ONE_SHOT
    assert decision.algorithm.startswith("one-shot, compressed on the wire")
    assert chosen(facts(8, in_band=True)).algorithm is A.TWO_SHOT


def test_ring_runs_only_when_asked_for_and_where_its_slots_fit() -> None:
    decision = low_precision(facts(3), algorithm="RING")
    assert decision.launch is not None
    assert decision.launch.algorithm is Algorithm.RING
    assert decision.algorithm.startswith("ring")
    small = low_precision(facts(8, Transport.SHM, workspace=96 << 10), algorithm="ring", wire_format="tq3")
    assert small.launch is not None
    assert small.launch.algorithm is Algorithm.TWO_SHOT
    assert "ring cannot run: a slot of the workspace" in small.reason
    assert "smaller than 2048 bytes" in small.reason
    # A GPU's workspace without flagged slots.
    assert "(0 bytes, with flags)" in low_precision(facts(4, in_band=True), algorithm="ring").reason


def check_one_step(group: GroupFacts, launch: Launch, count: int) -> None:
    if not launch.in_band:  # of what does not fit the slots in host memory
        assert (group.transport, launch.algorithm) == (Transport.HOST, Algorithm.TWO_SHOT)
        return
    assert launch.algorithm is Algorithm.ONE_SHOT
    packet = PACKETS[WireFormat.FP8]
    assert launch.chunk_vectors * VECTOR_BYTES % packet.bytes == 0
    assert packet.bytes <= launch.chunk_vectors * VECTOR_BYTES <= group.in_band.one_shot
    assert 1 <= launch.lanes <= group.lanes
    assert launch.threads % 32 == 0
    assert 32 <= launch.threads <= (256 if group.transport is Transport.HOST else 512)
    per_round = launch.chunk_vectors * VECTOR_BYTES // packet.bytes * packet.values
    assert (launch.rounds - 1) * per_round < count <= launch.rounds * per_round
    assert launch.rounds == 1 or group.transport is not Transport.HOST
    assert launch.scatter_lanes == launch.drain_lanes == 0


@given(
    any_facts,
    st.sampled_from(list(A)),
    st.sampled_from(list(WireFormat)),
    st.sampled_from((None, (0, 1) * 36, (5, 2, 2, 5) * 18, (0,) * 72, (0, 1, 2, 1) * 18)),
    st.booleans(),
    st.integers(1, 1 << 26),
)
def test_every_form_has_a_reason_and_a_launch_that_fits(
    group: GroupFacts, algorithm: A, wire: WireFormat, numbers: tuple[int, ...] | None, nvlink: bool, count: int
) -> None:
    domains = None if numbers is None else numbers[: group.world_size]
    group = dataclasses.replace(group, nvlink=nvlink)
    settings = {"algorithm": algorithm, "wire_format": wire, "domains": domains, "min_bytes": 0}
    form = chosen(group, **settings)
    assert form == chosen(dataclasses.replace(group), **settings)
    assert form.algorithm is not A.AUTO
    assert form.reason
    assert algorithm in (form.algorithm, A.AUTO) or (form.is_fallback and form.algorithm is A.TWO_SHOT)
    assert (form.algorithm is A.HIERARCHICAL) == bool(form.domains)
    if form.domains:
        assert domains_obstacle(form.domains) is None
        assert group.world_size in (4, 6, 8)
    decision = low_precision(group, count, **settings)
    if decision.strategy is not S.LOWPRECISION or form.algorithm is A.TWO_SHOT:
        return
    launch = decision.launch
    assert launch is not None
    if form.algorithm is A.ONE_SHOT:
        check_one_step(group, launch, count)
        return
    assert not launch.in_band
    assert launch.domains == form.domains
    unit_vectors = unit_bytes(config(**settings), form.algorithm) // VECTOR_BYTES
    assert launch.chunk_vectors % unit_vectors == 0
    assert 1 <= launch.chunk_vectors * VECTOR_BYTES <= group.flagged.two_shot
    assert 1 <= launch.lanes <= group.lanes
    assert launch.threads % 32 == 0
    assert 32 <= launch.threads <= 256
    parts = group.world_size // 2 if form.domains else group.world_size
    per_round = owned_vectors(launch) // unit_vectors * PACKETS[wire].values * parts
    assert (launch.rounds - 1) * per_round < count <= launch.rounds * per_round


@pytest.mark.parametrize(
    ("transport", "settings", "reason"),
    [
        (Transport.HOST, {}, "through host memory only two_shot was compared with the exact kernels"),
        (Transport.SYMMETRIC, {"wire_format": "tq3"}, "tq3 loses too much where partial sums are encoded once more"),
        (Transport.SYMMETRIC, {"wire_format": "hadamard2"}, "hadamard2 loses too much"),
    ],
)
def test_auto_stays_two_shot_but_hierarchical_can_be_asked_for(
    transport: Transport, settings: dict[str, Any], reason: str
) -> None:
    group = pcie(transport)
    assert f"two_shot rather than hierarchical: {reason}" in low_precision(group, **settings).reason
    asked = low_precision(group, algorithm="hierarchical", **settings)
    assert asked.launch is not None
    assert asked.launch.algorithm is Algorithm.HIERARCHICAL


def test_recorded_topologies() -> None:
    """What `llm-allreduce topo` says without GPUs."""
    for name, algorithm, domains in (
        ("l40s_x8_two_numa", A.HIERARCHICAL, NUMA),
        ("rtx4090_x8_no_p2p", A.TWO_SHOT, NUMA),
        ("h100_x8_nvswitch", A.TWO_SHOT, NUMA),
        ("h200_x4_nvswitch", A.TWO_SHOT, ()),
    ):
        group = group_facts(NodeTopology.from_json(FOLDER / f"{name}.json"))
        assert group.domains == domains
        assert chosen(group).algorithm is algorithm
        assert low_precision(group).strategy is S.LOWPRECISION
    half = group_facts(NodeTopology.from_json(FOLDER / "l40s_x8_two_numa.json"), 4)
    assert chosen(half).algorithm is A.TWO_SHOT


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        (
            {"algorithm": "star"},
            ["low_precision.algorithm='star'", "'auto', 'one_shot', 'two_shot', 'ring' or 'hierarchical'"],
        ),
        ({"domains": [0, -1]}, ["low_precision.domains.1=-1", "greater than or equal to 0"]),
        ({"domains": [0, "left"]}, ["low_precision.domains.1='left'", "valid integer"]),
        ({"domains": 2}, ["low_precision.domains=2", "tuple", "the domain of each rank"]),
        ({"domains": [0]}, ["low_precision.domains=[0]", "at least 2 items"]),
    ],
)
def test_bad_settings(setting: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"low_precision": setting})
    for part in parts:
        assert part in str(caught.value)


def test_settings() -> None:
    assert LowPrecisionConfig().algorithm is A.AUTO
    config = load_config({"low_precision": {"algorithm": " Hierarchical", "domains": [0, 0, 1, 1]}})
    assert config.low_precision.domains == (0, 0, 1, 1)
    config.check_world_size(4)
    with pytest.raises(
        ConfigError, match=r"low_precision\.domains=\[0, 0, 1, 1\]: has 4 numbers: must have one for each"
    ):
        config.check_world_size(8)
    AllReduceConfig().check_world_size(16)


def test_numa_nodes_are_agreed_on_only_where_all_are_known() -> None:
    found = [dataclasses.replace(card(), numa_node=node) for node in (1, 0, 1, 0)]
    assert cards.domains(found) == (1, 0, 1, 0)
    assert cards.domains([*found, card()]) == ()
    cards.check(found)


class FakeNvml:
    """Four GPUs on two NUMA nodes; NVLink joins the first two."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetTopologyCommonAncestor(self, _a: int, _b: int) -> int:
        return 30

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, index: int) -> int:
        return 0 if index != 2 or {a, b} == {0, 1} else 5

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: object) -> None:
            raise self.NVMLError(name)

        return refuse

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return type("Pci", (), {"busId": f"00000000:{handle}A:00.0".encode()})()


def test_what_nvml_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml())
    monkeypatch.setattr(nvml, "_numa_node", {"00000000:0A:00.0": 0, "00000000:3A:00.0": 1}.get)
    monkeypatch.setattr(nvml, "_attribute_by_bus_id", lambda _attribute: {})
    node = NodeTopology.detect()
    assert [card_of(str(gpu), node, monkeypatch).numa_node for gpu in range(4)] == [0, None, None, 1]
    assert card_of("MIG-7", node, monkeypatch).numa_node is None
    assert [link.startswith("NV") for link in node.links[0]] == [False, True, False, False]
    for ranks, nvlink in ((2, True), (3, False)):
        found = [card_of(str(gpu), node, monkeypatch) for gpu in range(ranks)]
        assert facts_of(gpus_of(found), found, AllReduceConfig()).nvlink is nvlink


def card_of(uuid: str, node: NodeTopology, monkeypatch: pytest.MonkeyPatch) -> cards.RankCard:
    """Of a rank on a GPU."""
    said = {"name": "NVIDIA H100", "uuid": uuid, "major": 9, "minor": 0, "multi_processor_count": 132}
    properties = type("Properties", (), said)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    return cards.RankCard.of_this_rank(AllReduceConfig(), torch.device("cuda", 0), node)
