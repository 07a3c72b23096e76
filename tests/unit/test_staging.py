"""Staged calls without GPUs: the handshake in simulated time, and the policy."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_allreduce_plugin import ConfigError, NodeTopology
from llm_allreduce_plugin.algorithms import measured, staging
from llm_allreduce_plugin.algorithms.decision import Algorithm, Decision
from llm_allreduce_plugin.algorithms.facts import SUPPORTED_WORLD_SIZES, GroupFacts, SlotBytes
from llm_allreduce_plugin.config import (
    AllReduceConfig,
    LowPrecisionAlgorithm,
    LowPrecisionConfig,
    StagedChoice,
    WireFormat,
    load_config,
)
from llm_allreduce_plugin.group.capabilities import group_facts
from llm_allreduce_plugin.group.cards import RankCard
from llm_allreduce_plugin.group.facts import facts_of, gpus_of
from llm_allreduce_plugin.selection.policy import decide, describe
from llm_allreduce_plugin.topology import nvml
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.wire import PACKETS
from tests.support.group_facts import facts
from tests.support.launches import owned_vectors
from tests.support.staged_model import Model, ViolationError

TOPOLOGIES = Path(__file__).parents[2] / "configs" / "topologies"
MIB = 1 << 20

# -- the handshake -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 8), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1 << 32), st.data())
def test_one_stream_out_and_one_in(ranks: int, lanes: int, rounds: int, seed: int, data: Any) -> None:
    slow = data.draw(st.none() | st.integers(0, ranks - 1))
    model = Model(ranks, 3, seed, slow=slow)
    model.exclusive = True
    model.run(
        [[partial(model.staged, rank, lanes, rounds, 0), partial(model.staged, rank, 1, 1, 1)] for rank in range(ranks)]
    )
    assert model.most_at_once > 1, "ranks should send at the same time"


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 6), st.integers(0, 1 << 32), st.data())
def test_staged_and_flagged_calls_share_slots(ranks: int, seed: int, data: Any) -> None:
    """In any order, with any grids: nothing unread is overwritten, and all come to an end."""
    calls = data.draw(st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.integers(1, 6)), min_size=2, max_size=6))
    model = Model(ranks, 3, seed, slow=data.draw(st.none() | st.integers(0, ranks - 1)))
    model.run(
        [
            [
                partial(
                    model.staged if staged else model.flagged, rank, lanes, -(-rounds // 3) if staged else rounds, call
                )
                for call, (staged, lanes, rounds) in enumerate(calls)
            ]
            for rank in range(ranks)
        ]
    )


@pytest.mark.parametrize("ranks", range(3, 9))
def test_the_model_sees_what_grants_prevent(ranks: int) -> None:
    """Without them two streams meet at the peer of a slow rank."""
    model = Model(ranks, 1, 7, slow=0, grants=False)
    model.exclusive = True
    with pytest.raises(ViolationError, match="more than one stream into a rank"):
        model.run([[partial(model.staged, rank, 1, 2, 0)] for rank in range(ranks)])


def test_the_model_sees_a_rank_that_is_missing() -> None:
    model = Model(4, 1, 7)
    with pytest.raises(ViolationError, match="3 ranks wait for ever"):
        model.run([[partial(model.staged, rank, 1, 1, 0)] * (rank != 2) for rank in range(4)])


# -- the policy --------------------------------------------------------------------------------------------------------


def pcie(world_size: int = 8, *, in_band: bool = True, workspace: int = 64 * MIB, **changes: Any) -> GroupFacts:
    """A group over PCIe peer access whose workspaces have both kinds of slots."""
    group = facts(world_size, in_band=in_band, workspace=workspace, architecture=89)
    flagged = facts(world_size, workspace=workspace).flagged
    return dataclasses.replace(group, flagged=flagged, nvlink=False, **changes)


def decision(
    group: GroupFacts, size: int, strategy: str = "TWOSHOT", dtype: str = "bfloat16", **settings: Any
) -> Decision:
    config = AllReduceConfig(allreduce_strategy=strategy, **settings)  # type: ignore[arg-type]
    return decide(config, group, size // 2, dtype)


def is_staged(*arguments: Any, **keywords: Any) -> bool:
    launch = decision(*arguments, **keywords).launch
    return launch is not None and launch.staged


def test_large_messages_are_staged_where_nvlink_does_not_join_the_gpus() -> None:
    limit = 8 * measured.STAGED_ABOVE_STAGE_BYTES
    for strategy in ("TWOSHOT", "MINLATENCY", "AUTO", "UB", "MNNVL"):
        assert is_staged(pcie(), limit + 256, strategy)
        assert not is_staged(pcie(), limit, strategy)
    assert not is_staged(pcie(), 64 * MIB, "ONESHOT")
    assert not is_staged(pcie(), 64 * MIB, "NCCL")
    assert not is_staged(dataclasses.replace(pcie(), nvlink=True), 64 * MIB)
    assert not is_staged(pcie(2), 64 * MIB)
    assert not is_staged(facts(8, Transport.HOST), 64 * MIB)
    assert not is_staged(facts(8, Transport.SHM), 64 * MIB)
    small = decision(pcie(), 64 << 10).launch
    assert small is not None
    assert small.in_band
    assert "staged" in str(decision(pcie(), 64 * MIB).launch)
    assert "staged" not in str(small)


def test_the_setting_forces_and_forbids() -> None:
    on, off = StagedChoice.ON, StagedChoice.OFF
    assert is_staged(pcie(), 2, staged=on)
    assert is_staged(dataclasses.replace(pcie(), nvlink=True), 64 * MIB, staged=on)
    assert not is_staged(pcie(), 64 * MIB, staged=off)
    for group, choice, reason in (
        (pcie(), off, "staged is off"),
        (pcie(2), on, "each of 2 ranks has one stream out and one in anyway"),
        (dataclasses.replace(pcie(), nvlink=True), StagedChoice.AUTO, "NVLink seems to join the GPUs"),
        (facts(4, Transport.HOST), on, "not for host memory"),
        (facts(4, Transport.SHM), on, "not for shm memory"),
    ):
        found = staging.refusal(AllReduceConfig(staged=choice), group)
        assert found is not None
        assert reason in found
        assert not is_staged(group, 64 * MIB, staged=choice)
    assert staging.refusal(AllReduceConfig(), pcie()) is None


def test_values_of_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, choice in (("AUTO", "auto"), ("on", "on"), ("Off", "off"), (True, "on"), (False, "off")):
        assert AllReduceConfig(staged=text).staged == choice  # type: ignore[arg-type]
    monkeypatch.setenv("LLM_ALLREDUCE_STAGED", "sometimes")
    with pytest.raises(ConfigError, match=r"environment: LLM_ALLREDUCE_STAGED='sometimes': .*'auto', 'on' or 'off'"):
        load_config()


@pytest.mark.parametrize("wire", list(WireFormat), ids=str)
def test_compressed_messages_are_staged_by_what_travels(wire: WireFormat) -> None:
    group, compressed = pcie(), LowPrecisionConfig(wire_format=wire, min_bytes=0)
    packet = PACKETS[wire]
    packets = measured.STAGED_ABOVE_STAGE_BYTES // packet.bytes  # of a part, the most that is not staged
    limit = packets * packet.values * 8 * 2
    below, above = (
        decision(group, size, "LOWPRECISION", low_precision=compressed).launch for size in (limit, limit + 16)
    )
    assert below is not None
    assert above is not None
    assert (below.staged, above.staged) == (False, True)
    assert above.wire_format is wire
    assert above.chunk_vectors * 16 % packet.bytes == 0


@given(
    st.integers(0, 1 << 28),
    st.sampled_from([size for size in SUPPORTED_WORLD_SIZES if size > 2]),
    st.integers(2 * MIB, 512 * MIB),
    st.none() | st.sampled_from(list(WireFormat)),
)
def test_launches_fit_their_slots(count: int, world_size: int, workspace: int, wire: WireFormat | None) -> None:
    settings_ = LowPrecisionConfig(min_bytes=0) if wire is None else LowPrecisionConfig(wire_format=wire, min_bytes=0)
    group = pcie(world_size, workspace=workspace * max(1, world_size // 8))
    if wire is not None and (world_size > 8 or group.flagged.two_shot < PACKETS[wire].bytes):
        return
    strategy = "TWOSHOT" if wire is None else "LOWPRECISION"
    launch = decision(group, count * 2, strategy, staged=StagedChoice.ON, low_precision=settings_).launch
    assert launch is not None
    assert launch.staged
    assert not launch.in_band
    values, unit = (8, 16) if wire is None else (PACKETS[wire].values, PACKETS[wire].bytes)
    assert launch.chunk_vectors * 16 % unit == 0
    assert 1 <= owned_vectors(launch) * 16 <= group.flagged.staged
    assert 1 <= launch.lanes <= measured.STAGED_LANES
    per_round = owned_vectors(launch) * 16 // unit * values * world_size
    assert launch.rounds == max(1, math.ceil(count / per_round))


@pytest.mark.parametrize("multiprocessors", (1, 8, 14, 31, 32, 132))
def test_all_blocks_run_at_once_on_the_smallest_gpu(multiprocessors: int) -> None:
    """They meet at barriers of the whole grid, and one to a multiprocessor always runs."""
    group = dataclasses.replace(pcie(), multiprocessors=multiprocessors)
    launch = decision(group, 256 * MIB).launch
    assert launch is not None
    assert launch.staged
    assert launch.lanes == min(multiprocessors, measured.STAGED_LANES)


def test_without_slots_nothing_is_staged() -> None:
    assert not is_staged(dataclasses.replace(pcie(), flagged=SlotBytes()), 64 * MIB)


# -- where the facts come from -----------------------------------------------------------------------------------------


def test_recorded_topologies() -> None:
    load = lambda name: NodeTopology.from_json(TOPOLOGIES / f"{name}.json")  # noqa: E731
    eight = group_facts(load("l40s_x8_two_numa"))
    assert not eight.nvlink
    two_shot = LowPrecisionConfig(algorithm=LowPrecisionAlgorithm.TWO_SHOT)  # by itself it goes by domains
    for strategy in ("AUTO", "MINLATENCY", "TWOSHOT", "LOWPRECISION"):
        chosen = decision(eight, 64 * MIB, strategy, low_precision=two_shot)
        assert chosen.launch is not None
        assert chosen.launch.staged
        assert chosen.launch.algorithm is Algorithm.TWO_SHOT
        assert (chosen.launch.wire_format is not None) == (strategy == "LOWPRECISION")
    assert describe(AllReduceConfig(), eight).endswith("TWOSHOT to 1 MiB, then TWOSHOT in stages")
    assert not is_staged(group_facts(load("l40s_x8_two_numa"), 2), 64 * MIB)
    for name in ("h100_x8_nvswitch", "h200_x4_nvswitch"):
        assert group_facts(load(name)).nvlink
        assert not is_staged(group_facts(load(name)), 64 * MIB)
    assert not is_staged(group_facts(load("rtx4090_x8_no_p2p")), 64 * MIB), "through host memory"


def test_pairs_with_bridges_are_not_joined() -> None:
    """What NVLink joins in pairs is joined by PCIe across them."""
    topology = NodeTopology.from_json(TOPOLOGIES / "l40s_x8_two_numa.json")
    links = [["NV4" if link == "PIX" else link for link in row] for row in topology.links]
    bridged = topology.model_copy(update={"links": tuple(map(tuple, links))})
    assert not group_facts(bridged).nvlink
    assert group_facts(bridged, 2).nvlink
    unknown = topology.model_copy(
        update={"links": tuple(tuple("X" if i == j else "?" for j in range(8)) for i in range(8))}
    )
    assert group_facts(unknown).nvlink, "nobody knows"


class Nvml:
    """GPUs by number; ``joined``: the pairs that NVLink joins; None: the driver does not say."""

    class NVMLError(Exception): ...

    def __init__(self, joined: set[tuple[int, int]] | None) -> None:
        self.joined = joined

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetTopologyCommonAncestor(self, _a: int, _b: int) -> int:
        if self.joined is None:
            raise self.NVMLError
        return 50

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: object) -> None:
            raise self.NVMLError(name)

        return refuse

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, index: int) -> int:
        if self.joined is None:
            raise self.NVMLError
        return 0 if index != 2 or (min(a, b), max(a, b)) in self.joined else 5


@pytest.mark.parametrize(
    ("joined", "nvlink"),
    [
        (None, True),
        ({(0, 1), (0, 2), (1, 2)}, True),
        ({(0, 1), (1, 2)}, False),
        (set(), False),
    ],
)
def test_nvlink_by_the_drivers_word(
    joined: set[tuple[int, int]] | None, nvlink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml(joined))
    monkeypatch.setattr(nvml, "_attribute_by_bus_id", lambda _attribute: {})
    assert has_nvlink("0", "GPU-1", "2") is nvlink
    assert has_nvlink("0", "MIG-1", "2"), "one that NVML does not know"
    monkeypatch.setattr(nvml, "_nvml", _no_nvml)
    assert has_nvlink("0", "1")


def has_nvlink(*uuids: str) -> bool:
    """Of a group on these GPUs, of whose ranks only the last one can ask NVML."""
    settings = AllReduceConfig()
    found = [
        dataclasses.replace(RankCard.of_rank(settings, "cuda"), gpu=uuid, multiprocessors=132, architecture=90)
        for uuid in uuids
    ]
    found[-1] = dataclasses.replace(found[-1], node=NodeTopology.detect())
    return facts_of(gpus_of(found), found, settings).nvlink


def _no_nvml() -> Any:
    raise nvml._NoNvmlError
