"""Which kernel AUTO and MINLATENCY take for a size: what the tables say, for every group."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import AllReduceStrategy
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.algorithms.facts import SUPPORTED_WORLD_SIZES, GroupFacts
from llm_allreduce_plugin.algorithms.measured import LINK_SCALE
from llm_allreduce_plugin.algorithms.tables import fastest, fused_pays
from llm_allreduce_plugin.selection.policy import decide
from llm_allreduce_plugin.topology.links import TopologyClass, Transport
from tests.support.group_facts import config, facts

S = AllReduceStrategy
PROFILES = Path(__file__).parents[2] / "configs" / "tuning"


def test_flashinfers_limits_are_per_rank_where_kernels_wait_for_flags() -> None:
    """tokens * hidden * 2 * tp * itemsize <= 512 / 64 / 42 MiB: 128, 8 and 2.625 MiB of payload."""
    for world_size, payload in ((2, 128 << 20), (4, 8 << 20), (8, 2688 << 10)):
        for architecture in (100, 103):
            group = facts(world_size, architecture=architecture)
            largest = decide(config("AUTO"), group, payload // 2, "bfloat16")
            assert largest.strategy is S.ONESHOT
            assert "FlashInfer's limits for B200" in largest.reason
            assert "estimate" not in largest.reason
            assert decide(config("AUTO"), group, payload // 2 + 1, "bfloat16").strategy is S.TWOSHOT
        # In band two-shot has no barriers: their limit would be far too high.
        if world_size > 2:
            in_band = facts(world_size, in_band=True, architecture=100)
            assert decide(config("AUTO"), in_band, payload // 2, "bfloat16").strategy is S.TWOSHOT
    limits = [fastest(size, 100, in_band=False).ranges[0].max_bytes for size in range(2, 33)]
    assert limits == sorted(limits, reverse=True)  # type: ignore[type-var]
    assert "an estimate from FlashInfer" in fastest(6, 100, in_band=False).source


def test_without_nvlink_links_are_those_of_pcie() -> None:
    """An H100 on PCIe is no H100 with NVLink."""
    nvlink = dataclasses.replace(facts(4, in_band=True), topology_class=TopologyClass.NVSWITCH)
    pcie = dataclasses.replace(nvlink, topology_class=TopologyClass.PCIE_PEER)
    size = 100 << 10
    assert decide(config("AUTO"), nvlink, size // 2, "bfloat16").strategy is S.ONESHOT
    other = decide(config("AUTO"), pcie, size // 2, "bfloat16")
    assert other.strategy is S.TWOSHOT
    assert "the seed table for 4 ranks over PCIe peer access: scaled by 0.1 from H200 for PCIe" in other.reason


def test_two_ranks_whose_links_were_not_measured_take_one_step() -> None:
    """It sends no more than two: the window of H200's profile comes of its grid, which no scale of links moves."""
    pcie = dataclasses.replace(facts(2, in_band=True), topology_class=TopologyClass.PCIE_PEER)
    for group in (pcie, facts(2, in_band=True, architecture=89), facts(2, in_band=True, architecture=100)):
        for size in (16, 300 << 10, 4 << 20, 1 << 30):
            decision = decide(config("AUTO"), group, size // 2, "bfloat16")
            assert decision.strategy is S.ONESHOT, (group.architecture, size)
            assert "one step sends no more than two: an estimate" in decision.reason


def test_the_seed_of_h200_is_what_its_newest_profiles_measured() -> None:
    seen = 0
    for name in ("nvidia-h200", "nvidia-h200-x4"):
        for entry in json.loads((PROFILES / f"{name}.json").read_text())["entries"]:
            if entry["transport"] != "symmetric":
                continue
            table = fastest(entry["world_size"], 90, in_band=True)
            assert [dataclasses.asdict(found) for found in table.ranges] == entry["graph"]
            assert table.source == f"measured on {entry['world_size']} H200"
            seen += 1
    assert seen == 3


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (facts(4, in_band=True), "measured on 4 H200)"),
        (facts(5, in_band=True), "an estimate: "),
        (facts(4, in_band=True, architecture=100), "an estimate)"),
        (facts(4), "measured on H200 with kernels that wait for flags)"),
        (facts(4, architecture=89), "measured on H200 with kernels that wait for flags: an estimate)"),
        (facts(4, Transport.SHM), "measured on H200 with kernels that wait for flags: an estimate)"),
        (facts(4, Transport.HOST), "measured on H200 through host memory)"),
        (facts(4, Transport.HOST, architecture=89), "measured on H200 through host memory: an estimate)"),
        (facts(4, Transport.HOST, architecture=None), "measured on H200 through host memory: an estimate)"),
        (facts(8, Transport.HOST, architecture=89), "an estimate beyond 4 ranks)"),
    ],
)
def test_what_was_not_measured_on_such_gpus_is_called_an_estimate(group: GroupFacts, reason: str) -> None:
    assert reason in decide(config("AUTO"), group, 64, "bfloat16").reason


def test_one_kernel_or_two_is_an_estimate_on_other_gpus_too() -> None:
    measured, other = (fused_pays("ONE_SHOT", facts(2, in_band=True, architecture=found)) for found in (90, 89))
    assert other == (measured[0], f"{measured[1]}: an estimate")


def test_small_messages_go_in_band_through_host_memory() -> None:
    group = facts(4, Transport.HOST, workspace=12 << 20)
    for size, algorithm, in_band in (
        (4 << 10, Algorithm.ONE_SHOT, True),
        (64 << 10, Algorithm.ONE_SHOT, True),
        (128 << 10, Algorithm.TWO_SHOT, True),
        (512 << 10, Algorithm.TWO_SHOT, True),
        (1 << 20, Algorithm.TWO_SHOT, False),
        (1 << 26, Algorithm.TWO_SHOT, False),
    ):
        launch = decide(config("MINLATENCY"), group, size // 2, "bfloat16").launch
        assert launch is not None
        assert (launch.algorithm, launch.in_band) == (algorithm, in_band), size


def test_min_latency_takes_the_kernel_of_the_table() -> None:
    """4 ranks change over between 128 and 256 KiB; 2 ranks come back to one step where the second no longer hides."""
    expected = {
        4: {1 << 17: Algorithm.ONE_SHOT, 1 << 18: Algorithm.TWO_SHOT, 1 << 28: Algorithm.TWO_SHOT},
        2: {1 << 21: Algorithm.ONE_SHOT, 1 << 22: Algorithm.TWO_SHOT, 1 << 24: Algorithm.ONE_SHOT},
    }
    for world_size, sizes in expected.items():
        for size, algorithm in sizes.items():
            decision = decide(config("MINLATENCY"), facts(world_size, in_band=True), size // 2, "bfloat16")
            assert decision.strategy is S.MINLATENCY
            assert decision.launch is not None
            assert decision.launch.algorithm is algorithm
            auto = decide(config("AUTO"), facts(world_size, in_band=True), size // 2, "bfloat16")
            assert auto.launch == decision.launch


@pytest.mark.parametrize("in_band", (False, True))
def test_auto_changes_over_where_the_table_does(in_band: bool) -> None:
    for world_size in SUPPORTED_WORLD_SIZES:
        group = facts(world_size, in_band=in_band)
        below = 0
        for found in fastest(world_size, 90, in_band=in_band).ranges:
            first = decide(config("AUTO"), group, below // 2 + 1, "bfloat16")
            assert first.strategy == found.strategy
            assert f"seed table for {world_size} ranks" in first.reason
            if found.max_bytes is not None:
                assert decide(config("AUTO"), group, found.max_bytes // 2, "bfloat16").strategy == found.strategy
                below = found.max_bytes
    small = config("AUTO", one_shot_max_bytes="1KiB")
    assert decide(small, facts(), 513, "bfloat16").strategy is S.TWOSHOT
    assert "one_shot_max_bytes" in decide(small, facts(), 513, "bfloat16").reason


@given(st.integers(1, 1000), st.sampled_from((None, 75, *LINK_SCALE)), st.booleans(), st.integers(0, 1 << 40))
def test_tables_know_every_group_and_size(world_size: int, architecture: int | None, in_band: bool, size: int) -> None:
    table = fastest(world_size, architecture, in_band=in_band)
    below, found = table.range_of(size)
    assert below <= size
    assert found.max_bytes is None or size <= found.max_bytes
    limits = [found.max_bytes for found in table.ranges[:-1]]
    assert None not in limits
    assert limits == sorted(limits)  # type: ignore[type-var]
