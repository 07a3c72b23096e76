"""An NVLink domain over hosts that are processes: the probe, its deadline, and groups that run over it.

NVML's answers come from a table, the driver's from :mod:`tests.support.fake_fabric`; the code in between is real.
"""

from __future__ import annotations

import dataclasses
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin import NodeTopology
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import StartTimeoutError
from llm_allreduce_plugin.measure.answers import wrong_elements
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.oracle.hosts import host_ordered_sum
from llm_allreduce_plugin.topology.fabric import domain_obstacle
from llm_allreduce_plugin.transport import mapped
from llm_allreduce_plugin.transport.fabric import FabricMemory
from llm_allreduce_plugin.transport.fabric_probe import domain_fault
from tests.support.fabric_ranks import fabric_of, placed
from tests.support.fake_fabric import FakeEntryPoints, Fault, Truth
from tests.support.forked import forked, wait_until
from tests.support.hosts import telling_inputs
from tests.support.marks import slow

DOMAINS = Path(__file__).parents[2] / "configs" / "topologies" / "domains"
RANKS = 3
CPU = torch.device("cpu")
WAIT_S = 1.5
ENDS = ("cuMemUnmap", "cuMemAddressFree", "cuMemRelease", "cuDevicePrimaryCtxRelease_v2")
# Every call of the probe, and the how-manieth of its name: those of a rank's own memory, of a peer's, of the words.
CALLS = (
    ("cuInit", 1),
    ("cuDeviceGet", 1),
    ("cuDevicePrimaryCtxRetain", 1),
    ("cuMemGetAllocationGranularity", 1),
    ("cuMemCreate", 1),
    ("cuMemAddressReserve", 1),
    ("cuMemMap", 1),
    ("cuMemSetAccess", 1),
    ("cuMemcpyHtoD_v2", 1),
    ("cuMemExportToShareableHandle", 1),
    ("cuMemImportFromShareableHandle", 2),
    ("cuMemAddressReserve", 3),
    ("cuMemMap", 2),
    ("cuMemSetAccess", 3),
    ("cuMemcpyHtoD_v2", 2),
    ("cuCtxSynchronize", 3),
    ("cuMemcpyDtoH_v2", 1),
    ("cuMemcpyDtoH_v2", 3),
)


@dataclasses.dataclass(frozen=True)
class Scenario(Fault):
    """What is true of each rank's GPU, and what goes wrong. ``lost``: what this rank writes to others goes nowhere."""

    truths: tuple[Truth, ...] = (Truth(),) * RANKS
    lost: int = -1

    def entry_points(self, rank: int) -> FakeEntryPoints:
        """Of a rank."""
        return FakeEntryPoints(self.truths[rank], self.on(rank), lose=rank == self.lost)


def probes(context: RankContext, scenarios: list[Scenario], wait_s: float) -> list[tuple[str | None, float, int]]:
    """On a rank: verdict, seconds, and what is left in the driver (-1: it hangs there), of each."""
    found = []
    agreement = Agreement(context.group, 30.0)
    for scenario in scenarios:
        entry_points = scenario.entry_points(context.rank)
        agreement.barrier("to begin together")
        began = time.monotonic()
        with fabric_of(entry_points), mock.patch.object(mapped, "CLOSE_WAIT_S", WAIT_S):
            fault = domain_fault(agreement, CPU, wait_s=wait_s)
        seconds = time.monotonic() - began
        # Of a rank that was still at it when another failed, moments later.
        hangs = context.rank == scenario.rank and (scenario.hangs or scenario.call in ENDS)
        wait_until(lambda: hangs or not sum(entry_points.left().values()))  # noqa: B023  (asked at once)
        found.append((fault, seconds, -1 if hangs else sum(entry_points.left().values())))
    agreement.close()
    return found


def verdicts(
    scenarios: list[Scenario], wait_s: float = 20.0, ranks: int = RANKS
) -> list[list[tuple[str | None, float, int]]]:
    """Of each scenario, of every rank."""
    with forked(ranks, probes, scenarios, wait_s) as group:
        found = [group.value(rank, 150) for rank in range(ranks)]
    return [list(of) for of in zip(*found, strict=True)]


def test_a_domain_is_proved() -> None:
    for of_ranks in verdicts([Scenario()] * 3):
        for fault, _, left in of_ranks:
            assert fault is None
            assert left == 0


def test_eight_ranks_of_four_hosts() -> None:
    (of_ranks,) = verdicts([Scenario(truths=(Truth(),) * 8)], ranks=8)
    assert [fault for fault, *_ in of_ranks] == [None] * 8


def test_what_is_not_true_is_found_out() -> None:
    """NVML's word is not asked here: the same verdict on every rank, and nothing is left."""
    here, there, nowhere = Truth("rack"), Truth("other rack"), Truth(None)
    closed = Truth("rack", imex_channel=False)
    cases = {
        "cannot allocate memory that other hosts can map: cuMemCreate: CUDA_ERROR_NOT_SUPPORTED (801)": (nowhere,) * 3,
        "rank 2 cannot allocate memory that other hosts can map: cuMemCreate: CUDA_ERROR_NOT_SUPPORTED": (
            here,
            here,
            nowhere,
        ),
        # Whoever is the first to find it out.
        "cuMemImportFromShareableHandle: CUDA_ERROR_INVALID_HANDLE (400)": (here, here, there),
        "rank 1 cannot map: memory of rank 0: cuMemImportFromShareableHandle: CUDA_ERROR_NOT_PERMITTED (800)": (
            here, closed, here,
        ),
        "rank 1 cannot allocate memory that other hosts can map: the driver has no fabric handles for this GPU": (
            here, Truth(handles=False), here,
        ),
    }  # fmt: skip
    scenarios = [Scenario(truths=truths) for truths in cases.values()]
    for text, of_ranks in zip(cases, verdicts(scenarios), strict=True):
        assert len({fault for fault, *_ in of_ranks}) == 1, of_ranks
        for fault, _, left in of_ranks:
            assert fault is not None and text in fault, fault
            assert left == 0


@pytest.mark.parametrize("lost", range(RANKS))
def test_bytes_that_do_not_arrive(lost: int) -> None:
    (of_ranks,) = verdicts([Scenario(lost=lost)])
    faults = {fault for fault, *_ in of_ranks}
    assert len(faults) == 1
    # Whoever is the first to find it out: a peer, or the writer, which reads zeros from a peer.
    found = re.fullmatch(
        rf"rank (\d) cannot use its peers' memory: (what rank {lost} wrote to rank \1's memory over the NVLink domain "
        rf"did not arrive|rank {lost} reads something else from rank \d's memory than it wrote there)",
        str(faults.pop()),
    )
    assert found is not None, of_ranks
    assert ("reads" in found[2]) is (int(found[1]) == lost)
    assert all(left == 0 for *_, left in of_ranks)


def test_an_error_of_any_call_on_any_rank_stops_all_alike() -> None:
    scenarios = [Scenario(rank=rank, call=call, count=count) for call, count in CALLS for rank in range(RANKS)]
    for scenario, of_ranks in zip(scenarios, verdicts(scenarios), strict=True):
        faults = {fault for fault, *_ in of_ranks}
        assert len(faults) == 1, (scenario, of_ranks)
        assert f"{scenario.call}: CUDA_ERROR_UNKNOWN (999)" in str(faults), (scenario, faults)
        assert f"rank {scenario.rank} cannot" in str(faults), (scenario, faults)
        assert [left for *_, left in of_ranks] == [0] * RANKS, (scenario, of_ranks)


# Each takes until its deadline: every third of them, at each rank in turn, and with the slow tests the others.
@pytest.mark.parametrize("places", (range(0, len(CALLS), 3), slow([at for at in range(len(CALLS)) if at % 3])), ids=len)
def test_a_call_that_never_returns_stops_all_alike_at_the_deadline(places: Sequence[int]) -> None:
    scenarios = [
        Scenario(rank=number % RANKS, call=CALLS[place][0], count=CALLS[place][1], hangs=True)
        for number, place in enumerate(places)
    ]
    for scenario, of_ranks in zip(scenarios, verdicts(scenarios, WAIT_S), strict=True):
        faults = {fault for fault, *_ in of_ranks}
        assert len(faults) == 1, (scenario, of_ranks)
        assert f"rank {scenario.rank} cannot" in str(faults), (scenario, faults)
        assert f"not done after {WAIT_S:g} s" in str(faults), (scenario, faults)
        assert max(seconds for _, seconds, _ in of_ranks) < WAIT_S + 4.0, (scenario, of_ranks)
        assert sorted(left for *_, left in of_ranks) == [-1, 0, 0], "only the driver that hangs keeps something"


def test_an_end_that_goes_wrong_is_no_verdict() -> None:
    """What cannot be let go of stays behind, for no longer than a while, and the proof holds."""
    scenarios = [
        Scenario(rank=number % RANKS, call=call, hangs=hangs)
        for number, call in enumerate(ENDS)
        for hangs in (False, True)
    ]
    for scenario, of_ranks in zip(scenarios, verdicts(scenarios, WAIT_S), strict=True):
        assert [fault for fault, *_ in of_ranks] == [None] * RANKS, scenario
        assert max(seconds for _, seconds, _ in of_ranks) < 2 * WAIT_S + 4.0, (scenario, of_ranks)
        others = [left for rank, (*_, left) in enumerate(of_ranks) if rank != scenario.rank]
        assert others == [0] * (RANKS - 1), (scenario, of_ranks)


def gone_in_the_probe(context: RankContext, scenario: Scenario) -> Any:
    agreement = Agreement(context.group, 4.0)
    with fabric_of(scenario.entry_points(context.rank)):
        try:
            return domain_fault(agreement, CPU, wait_s=WAIT_S)
        except StartTimeoutError as error:
            return error.missing


@pytest.mark.parametrize("end", (signal.SIGKILL, signal.SIGSTOP))
def test_a_rank_that_is_gone_ends_the_start(end: signal.Signals) -> None:
    scenario = Scenario(rank=1, call="cuMemExportToShareableHandle", hangs=True)
    with forked(RANKS, gone_in_the_probe, scenario) as ranks:
        time.sleep(0.3)
        ranks.send(1, end)
        for rank in (0, 2):
            assert ranks.value(rank, 20) == [1]


# -- groups ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    """What a group came to, and what its answers were."""

    fabric: bool
    reason: str
    transport: str
    over_fabric: bool
    explained: str
    against_mnnvl: str
    asked_driver: int
    wrong: int
    left: int
    bits: list[bytes]


def run_group(context: RankContext, name: str, truths: list[Truth], strategies: list[str]) -> list[Found]:
    """Groups over the domain of this name, one after another."""
    topology = NodeTopology.from_json(DOMAINS / f"{name}.json")
    found = []
    for strategy in strategies:
        entry_points = FakeEntryPoints(truths[context.rank])
        hosts, fabrics = [gpu.host for gpu in topology.gpus], [gpu.fabric for gpu in topology.gpus]
        with placed(context.rank, hosts, fabrics), fabric_of(entry_points) as asked:
            group = context.communicator(strategy, timeout_s=20.0)
            wrong, bits = 0, []
            for count in (0, 1, 1000, 70_001):
                seed = context.shared_seed()
                inputs = telling_inputs(seed, context.world_size, count, torch.bfloat16)
                result = group.all_reduce(inputs[context.rank])
                # Over a network, the ranks of each host first.
                expected = host_ordered_sum(inputs, group.facts.host_order)
                wrong += wrong_elements(result, expected, exact=True, world_size=context.world_size)
                bits.append(result.view(torch.int16).numpy().tobytes())
            decision = group.explain((4096,), torch.bfloat16)
            against = {passed.strategy: passed.reason for passed in decision.passed_over}
            memory = group._held.memory
            one = Found(
                group.facts.fabric, group.facts.no_fabric_reason, str(group.facts.transport),
                isinstance(memory, FabricMemory), decision.reason, against.get("MNNVL", ""), len(asked), wrong, -1,
                bits,
            )  # fmt: skip
            del memory
            group.close()
            one.left = sum(entry_points.left().values())
            found.append(one)
    return found


def groups(name: str, truths: list[Truth], strategies: list[str]) -> list[list[Found]]:
    """Of each strategy, of every rank."""
    with forked(4, run_group, name, truths, strategies) as ranks:
        found = [ranks.value(rank, 150) for rank in range(4)]
    return [list(of) for of in zip(*found, strict=True)]


def truths_of(name: str) -> list[Truth]:
    return [Truth.of(gpu.fabric) for gpu in NodeTopology.from_json(DOMAINS / f"{name}.json").gpus]


@pytest.mark.parametrize("name", ("one_domain", "placeholder_clique"))
def test_two_hosts_of_one_domain_sum_like_one(name: str) -> None:
    """Every exact strategy, to the bit in rank order, on memory that only fabric handles have brought."""
    strategies = ["MNNVL", "AUTO", "ONESHOT", "TWOSHOT", "MINLATENCY"]
    for strategy, of_ranks in zip(strategies, groups(name, truths_of(name), strategies), strict=True):
        for one in of_ranks:
            assert (one.fabric, one.reason, one.over_fabric) == (True, "", True)
            assert one.transport == "shm", "CPU ranks stand in for GPUs"
            assert one.wrong == 0
            assert one.left == 0, "closed, nothing is mapped"
            assert one.explained.startswith(f"allreduce_strategy is {strategy}") or strategy == "AUTO"
            assert one.bits == of_ranks[0].bits


@pytest.mark.parametrize("name", sorted(path.stem for path in DOMAINS.glob("*.json")))
def test_every_fact_about_a_fabric_has_one_verdict(name: str) -> None:
    """The reason is in the facts, in what explain says, and in MNNVL's obstacle, on all ranks alike."""
    topology = NodeTopology.from_json(DOMAINS / f"{name}.json")
    said = domain_obstacle([gpu.fabric for gpu in topology.gpus])
    truths = [Truth(None)] * 4 if name == "completed_without_domain" else truths_of(name)
    auto, mnnvl = groups(name, truths, ["AUTO", "MNNVL"])
    for one in auto + mnnvl:
        assert (one.fabric, one.reason) == (auto[0].fabric, auto[0].reason)
        assert one.left == 0
        if name in {"one_domain", "placeholder_clique"}:
            assert one.fabric
            assert one.reason == ""
            continue
        assert not one.fabric
        assert not one.over_fabric
        assert one.transport == "shm", "over a network instead"
        assert one.wrong == 0
        if name == "completed_without_domain":
            assert said is None
            assert "cuMemCreate: CUDA_ERROR_NOT_SUPPORTED (801)" in one.reason
        else:
            assert one.reason == said
            assert one.asked_driver == 0, "what is known is not tried"
    for one in mnnvl:
        assert one.reason in one.explained
    for one in auto:
        assert one.fabric or one.against_mnnvl == one.reason


def test_nvml_calls_two_racks_one_domain() -> None:
    """As H100 and some clusters do: the driver knows better, and the group goes on without."""
    truths = [Truth("here")] * 2 + [Truth("there")] * 2
    (of_ranks,) = groups("one_domain", truths, ["MNNVL"])
    for one in of_ranks:
        assert not one.fabric
        assert re.fullmatch(
            r"rank ([01] cannot map: memory of rank 2|[23] cannot map: memory of rank 0): "
            r"cuMemImportFromShareableHandle: CUDA_ERROR_INVALID_HANDLE \(400\)",
            one.reason,
        )
        assert one.reason == of_ranks[0].reason
        assert one.left == 0
        assert one.wrong == 0, "over a network instead"
        assert one.bits == of_ranks[0].bits
