"""The facts of a group have one source; NVML is asked once for them."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, cast

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig, NodeTopology
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.base.pickled import dump, load
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.group import start
from llm_allreduce_plugin.group.capabilities import group_facts
from llm_allreduce_plugin.group.cards import RankCard, check
from llm_allreduce_plugin.group.facts import facts_of, gpus_of, reach_of
from llm_allreduce_plugin.topology import nvml
from llm_allreduce_plugin.topology.links import TopologyClass, Transport
from tests.unit.test_topology import FOLDER, FakeNvml

H200 = NodeTopology.from_json(FOLDER / "h200_x4_nvswitch.json")


def cards_on(topology: NodeTopology, settings: AllReduceConfig, *knowing: int) -> list[RankCard]:
    """Of ranks on all GPUs of a node, the last one on its first GPU; only ``knowing`` can ask NVML."""
    card = RankCard.of_rank(settings, "cuda")
    return [
        dataclasses.replace(
            card,
            architecture=gpu.architecture,
            gpu=gpu.uuid,
            gpu_name=gpu.name,
            multiprocessors=gpu.multiprocessors or 0,
            numa_node=gpu.numa_node,
            node=topology if rank in knowing else NodeTopology(),
        )
        for rank, gpu in enumerate(reversed(topology.gpus))
    ]


def named(topology: NodeTopology) -> NodeTopology:
    """With UUIDs, which recorded nodes may lack."""
    gpus = [gpu.model_copy(update={"uuid": f"GPU-{number}"}) for number, gpu in enumerate(topology.gpus)]
    return topology.model_copy(update={"gpus": tuple(gpus)})


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("strategy", ("AUTO", "ONESHOT", "LOWPRECISION"))
def test_ranks_come_to_the_facts_that_are_explained(path: Any, strategy: str) -> None:
    """The cards of a real group, whose last rank alone can ask NVML, and the recorded node."""
    topology, settings = named(NodeTopology.from_json(path)), AllReduceConfig(allreduce_strategy=strategy)
    if topology.hosts > 1 or len(topology.gpus) < 2:
        pytest.skip("no rank sees other hosts' GPUs")
    found = cards_on(topology, settings, len(topology.gpus) - 1)
    backwards = topology.subset(range(len(topology.gpus))[::-1])
    assert gpus_of(found).gpus == backwards.gpus
    assert facts_of(gpus_of(found), found, settings) == group_facts(backwards, config=settings)


def test_cards_travel() -> None:
    sent = cards_on(H200, AllReduceConfig(), 0)[0]
    assert load(dump(sent)) == sent


def test_nobody_knows_the_links() -> None:
    topology, settings = named(H200), AllReduceConfig()
    found = cards_on(topology, settings)
    facts = facts_of(gpus_of(found), found, settings)
    assert (facts.transport, facts.topology_class) == (Transport.SYMMETRIC, TopologyClass.UNKNOWN)
    assert facts.nvlink


def test_what_failed_is_passed_over_with_its_reason() -> None:
    topology, settings = named(H200), AllReduceConfig()
    found = cards_on(topology, settings, 0)
    reach = reach_of(gpus_of(found), found, settings, {Transport.SYMMETRIC: "bytes were lost"})
    assert reach.facts.transport is Transport.HOST
    assert reach.passed_over == ("bytes were lost",)
    both = {Transport.SYMMETRIC: "bytes were lost", Transport.HOST: "no memory"}
    facts = facts_of(gpus_of(found), found, settings, both)
    assert (facts.transport, facts.no_transport_reason) == (Transport.NONE, "bytes were lost; no memory")


def test_two_ranks_on_one_gpu_share_no_memory() -> None:
    topology, settings = named(H200), AllReduceConfig()
    found = cards_on(topology, settings, 0)
    found[1] = dataclasses.replace(found[1], gpu=found[0].gpu)
    assert facts_of(gpus_of(found), found, settings).no_transport_reason == "several ranks share a GPU"


# -- NVML --------------------------------------------------------------------------------------------------------------


def test_gpus_of_two_architectures_run_the_engines_own() -> None:
    found = cards_on(named(H200), AllReduceConfig(), 0)
    found[1] = dataclasses.replace(found[1], architecture=80)
    check(found)  # no rank is told that it is set up wrongly
    reached = reach_of(gpus_of(found), found, AllReduceConfig())
    assert reached.layout is None
    assert reached.facts.transport is Transport.NONE
    assert reached.facts.no_transport_reason == (
        "kernels are launched alike on every GPU of a group, and these are of several architectures: "
        "sm_90 on ranks 0, 2, 3, sm_80 on rank 1"
    )


class CountingNvml(FakeNvml):
    """Two GPUs; counts how often it is set up, and how often it is asked for the links of a pair."""

    def __init__(self) -> None:
        self.started = 0
        self.pairs: list[tuple[int, int, int]] = []

    def nvmlInit(self) -> None:
        self.started += 1

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, index: int) -> int:
        self.pairs.append((a, b, index))
        return 0


class TwoRanks:
    """The agreement of rank 0 with a rank on the other GPU, which does as it does."""

    rank, world_size = 0, 2

    def gather(self, card: RankCard, _step: str) -> list[RankCard]:
        return [card, dataclasses.replace(card, gpu="1")]

    def first_fault(self, fault: str | None, _step: str) -> str | None:
        return fault

    def from_first_rank(self, make: Any, _step: str, _raising: type[Exception]) -> Any:
        return make()


@pytest.mark.parametrize("peer_access_works", (True, False))
def test_a_start_asks_nvml_once(peer_access_works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, tried = CountingNvml(), []
    monkeypatch.setitem(sys.modules, "pynvml", asked)
    monkeypatch.setattr(nvml, "_attribute_by_bus_id", lambda _attribute: {})
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.delenv("NCCL_P2P_LEVEL", raising=False)
    told = {"name": "NVIDIA H200", "uuid": "0", "major": 9, "minor": 0, "multi_processor_count": 132}
    properties = type("Properties", (), told)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")

    def connect(_self: object, transport: Transport, _layout: object) -> tuple[None, None]:
        tried.append(transport)
        if transport is Transport.SYMMETRIC and not peer_access_works:
            message = "bytes were lost"
            raise TransportError(message)
        return None, None

    monkeypatch.setattr(start._Start, "_connect", connect)
    opened = start.open_group(
        cast("Agreement", TwoRanks()), cast("Any", None), torch.device("cuda", 0), AllReduceConfig()
    )
    facts: GroupFacts = opened.facts
    assert facts.nvlink
    if peer_access_works:
        assert tried == [Transport.SYMMETRIC]
        assert facts.topology_class is TopologyClass.NVLINK, "what NVML said has come here"
    else:
        assert tried == [Transport.SYMMETRIC, Transport.HOST]
        assert facts.topology_class is TopologyClass.HOST_MEMORY
    assert asked.started == 1
    assert len(asked.pairs) == len(set(asked.pairs)), "no question is put twice"
