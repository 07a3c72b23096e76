"""NVLink domains over several hosts, by what is said of them: verdicts, facts, and who may use them."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import AllReduceConfig, NodeTopology
from llm_allreduce_plugin.base.pickled import dump, load
from llm_allreduce_plugin.config import AllReduceStrategy as S
from llm_allreduce_plugin.group.capabilities import group_facts
from llm_allreduce_plugin.group.cards import RankCard, domain_refusal, domains, hosts_of
from llm_allreduce_plugin.group.facts import domain_fault, facts_of, gpus_of, reach_of
from llm_allreduce_plugin.selection.policy import decide
from llm_allreduce_plugin.topology import nvml
from llm_allreduce_plugin.topology.fabric import domain_notes, domain_obstacle, ranks_in_words
from llm_allreduce_plugin.topology.files import _contradictions
from llm_allreduce_plugin.topology.hosts import joined, repeated
from llm_allreduce_plugin.topology.links import TopologyClass, Transport
from llm_allreduce_plugin.topology.node import Fabric
from tests.unit.test_topology import FakeNvml

FOLDER = Path(__file__).parents[2] / "configs" / "topologies"
DOMAINS = FOLDER / "domains"
# Every fact about a fabric, and what it comes to; None: one domain, as far as is said.
VERDICTS: dict[str, str | None] = {
    "one_domain": None,
    "placeholder_clique": None,
    "completed_without_domain": None,  # nobody tells: only the proof finds out
    "two_racks": "the ranks are in 2 NVLink domains: ranks 0-1 in 5f6c1d3a... clique 32766; ranks 2-3 in 0b9c2f11... "
    "clique 32766 (32766 is a placeholder, equal on unrelated racks)",
    "two_cliques": "the ranks are in 2 NVLink domains: ranks 0-1 in 5f6c1d3a... clique 1; ranks 2-3 in 5f6c1d3a... "
    "clique 2",
    "one_gpu_elsewhere": "the ranks are in 2 NVLink domains: ranks 0-2 in 5f6c1d3a... clique 1; rank 3 in "
    "5f6c1d3a... clique 7",
    "zero_uuid": "ranks 0-3: the cluster UUID is all zero, which names no domain",
    "status": "rank 2: fabric status is 'Insufficient Resources', must be 'success'",
    "in_progress": "ranks 2-3: fabric state is 'in progress', must be 'completed' (is nvidia-fabricmanager or "
    "nvidia-imex up?)",
    "no_imex_channel": "ranks 2-3: no IMEX channel can be opened (/dev/nvidia-caps-imex-channels), "
    "and without one no memory of another host can be imported",
    "no_handles": "ranks 0-3: the driver has no fabric handles for this GPU, whatever its fabric state",
    "unknown": "ranks 2-3: NVML reports no NVLink fabric for this GPU",
}
KERNELS = (S.MNNVL, S.AUTO, S.ONESHOT, S.TWOSHOT, S.MINLATENCY)


def domain(name: str) -> NodeTopology:
    return NodeTopology.from_json(DOMAINS / f"{name}.json")


def cards_on(topology: NodeTopology, settings: AllReduceConfig) -> list[RankCard]:
    """As ranks on these GPUs make them: each knows the GPUs of its own host."""
    card = RankCard.of_rank(settings, "cuda")
    nodes = {
        host: topology.subset([at for at, gpu in enumerate(topology.gpus) if gpu.host == host]).model_copy(
            update={"source": "nvml"}
        )
        for host in {gpu.host for gpu in topology.gpus}
    }
    return [
        dataclasses.replace(
            card,
            architecture=gpu.architecture,
            host=f"host{gpu.host}",
            gpu=gpu.uuid,
            gpu_name=gpu.name,
            multiprocessors=gpu.multiprocessors or 0,
            numa_node=gpu.numa_node,
            fabric=gpu.fabric,
            node=nodes[gpu.host],
        )
        for gpu in topology.gpus
    ]


def test_every_fact_has_a_topology() -> None:
    assert {path.stem for path in DOMAINS.glob("*.json")} == set(VERDICTS)


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name: str, tmp_path: Path) -> None:
    topology = domain(name)
    assert domain_obstacle([gpu.fabric for gpu in topology.gpus]) == VERDICTS[name]
    copy = tmp_path / "copy.json"
    copy.write_text(topology.model_dump_json())
    assert NodeTopology.from_json(copy) == topology


@pytest.mark.parametrize("name", VERDICTS)
def test_who_may_use_a_domain_and_what_the_others_say(name: str) -> None:
    topology, verdict = domain(name), VERDICTS[name]
    for strategy in KERNELS:
        settings = AllReduceConfig(allreduce_strategy=strategy)
        facts = group_facts(topology, config=settings)
        ranks = cards_on(topology, settings)
        assert facts_of(gpus_of(ranks), ranks, settings) == facts, "explain and engine agree"
        assert facts.hosts == (0, 0, 1, 1)
        assert (facts.fabric, facts.no_fabric_reason) == (verdict is None, verdict or "")
        decision = decide(settings, facts, 4096, "bfloat16")
        if verdict is None:
            assert facts.transport is Transport.SYMMETRIC
            assert facts.topology_class is TopologyClass.NVSWITCH
            assert not decision.is_fallback
            assert decision.launch is not None
            assert decision.strategy in {strategy, S.ONESHOT}
        elif strategy is S.MNNVL or decision.launch is None:
            assert verdict in decision.reason, "the verdict is what explain says"
    against = {
        passed.strategy: passed.reason for passed in decide(AllReduceConfig(), facts, 4096, "bfloat16").passed_over
    }
    assert (against[S.MNNVL] == verdict) is (verdict is not None), "and MNNVL's obstacle"


def test_a_domain_runs_what_one_host_runs() -> None:
    """The same launches, so the same bits: nothing below knows of hosts."""
    across, within = domain("one_domain"), domain("one_domain")
    within = within.model_copy(update={"gpus": tuple(gpu.model_copy(update={"host": 0}) for gpu in within.gpus)})
    for strategy in (S.ONESHOT, S.TWOSHOT, S.MINLATENCY):
        settings = AllReduceConfig(allreduce_strategy=strategy)
        for count in (1, 4096, 1 << 20, 1 << 25):
            both = [
                decide(settings, group_facts(node, config=settings), count, "bfloat16") for node in (across, within)
            ]
            assert both[0].launch == both[1].launch
        mnnvl = AllReduceConfig(allreduce_strategy=S.MNNVL)
        fastest = AllReduceConfig(allreduce_strategy=S.MINLATENCY)
        assert (
            decide(mnnvl, group_facts(across, config=mnnvl), count, "bfloat16").launch
            == decide(fastest, group_facts(across, config=fastest), count, "bfloat16").launch
        )


def test_mnnvl_on_one_host_says_so() -> None:
    one = NodeTopology.from_json(FOLDER / "h200_x4_nvswitch.json")
    settings = AllReduceConfig(allreduce_strategy=S.MNNVL)
    decision = decide(settings, group_facts(one, config=settings), 4096, "bfloat16")
    assert decision.strategy is S.MINLATENCY
    assert decision.is_fallback
    assert decision.reason == "all ranks are on one host: MNNVL is for an NVLink domain over several"


@pytest.mark.parametrize("world_size", (8, 36, 72))
def test_a_rack(world_size: int) -> None:
    rack = NodeTopology.from_json(FOLDER / "gb200_x72_nvl72.json")
    facts = group_facts(rack, world_size)
    assert facts.fabric
    assert len(set(facts.hosts)) == world_size // 4
    for count in (64, 8192, 8192 * 512):
        assert decide(AllReduceConfig(), facts, count, "bfloat16").launch is not None


def test_host_memory_is_of_one_host() -> None:
    settings = AllReduceConfig(transport="host")
    facts = group_facts(domain("one_domain"), config=settings)
    reason = "makes ranks use host memory, which other hosts cannot reach"
    assert (facts.fabric, facts.no_fabric_reason) == (False, f"transport host {reason}")
    facts = group_facts(domain("one_domain"), refusal="NCCL_P2P_DISABLE=1")
    assert (facts.fabric, facts.no_fabric_reason) == (False, f"NCCL_P2P_DISABLE=1 {reason}")
    assert group_facts(
        domain("one_domain"), config=AllReduceConfig(transport="peer"), refusal="NCCL_P2P_DISABLE=1"
    ).fabric


def test_what_was_proved_wrong_counts_whatever_cards_say() -> None:
    settings = AllReduceConfig()
    ranks = cards_on(domain("one_domain"), settings)
    refused = "rank 3 cannot map: cuMemImportFromShareableHandle: CUDA_ERROR_NOT_PERMITTED (800)"
    facts = reach_of(gpus_of(ranks, refused), ranks, settings, no_domain=refused).facts
    assert not facts.fabric
    assert facts.no_fabric_reason == refused
    mnnvl = AllReduceConfig(allreduce_strategy=S.MNNVL)
    assert decide(mnnvl, facts, 4096, "bfloat16").reason.startswith(refused)


def test_the_user_refuses_a_domain_as_nccl_knows_it() -> None:
    assert domain_refusal({"NCCL_MNNVL_ENABLE": "0"}) == "NCCL_MNNVL_ENABLE=0"
    for value in ({}, {"NCCL_MNNVL_ENABLE": "1"}, {"NCCL_MNNVL_ENABLE": "2"}, {"NCCL_MNNVL_ENABLE": ""}):
        assert domain_refusal(value) is None
    ranks = cards_on(domain("one_domain"), AllReduceConfig())
    ranks[2] = dataclasses.replace(ranks[2], domain_refusal="NCCL_MNNVL_ENABLE=0")
    assert domain_fault(ranks) == "NCCL_MNNVL_ENABLE=0 on rank 2"
    everywhere = [dataclasses.replace(card, domain_refusal="NCCL_MNNVL_ENABLE=0") for card in ranks]
    assert domain_fault(everywhere) == "NCCL_MNNVL_ENABLE=0"


def test_one_host_needs_no_domain() -> None:
    settings = AllReduceConfig()
    ranks = [dataclasses.replace(card, host="one") for card in cards_on(domain("zero_uuid"), settings)]
    assert domain_fault(ranks) is None
    facts = facts_of(NodeTopology(), ranks, settings)
    assert (facts.fabric, facts.no_fabric_reason) == (False, "")
    assert facts.transport is Transport.SYMMETRIC


def test_cards_with_a_fabric_travel() -> None:
    for card in cards_on(domain("status"), AllReduceConfig()):
        assert load(dump(card)) == card


@given(st.lists(st.sampled_from(("a", "b", "c")), min_size=1, max_size=9))
def test_gpus_come_in_rank_order_on_whatever_hosts_they_are(names: list[str]) -> None:
    """Ranks of a host need not follow each other; each host has been asked for itself alone."""
    whole = joined([domain("one_domain").subset([0, 1])] * 5)
    gpus = [gpu.model_copy(update={"uuid": f"GPU-{at}", "host": 0, "index": at}) for at, gpu in enumerate(whole.gpus)][
        : len(names)
    ]
    everything = whole.subset(range(len(names))).model_copy(update={"gpus": tuple(gpus)})
    card = dataclasses.replace(RankCard.of_rank(AllReduceConfig(), "cuda"), architecture=100)
    ranks = []
    for rank, name in enumerate(names):
        on_host = [at for at, other in enumerate(names) if other == name][::-1]  # NVML has its own order
        node = everything.subset(on_host)
        links = tuple(tuple("X" if a == b else "NV18" for b in on_host) for a in on_host)
        ranks.append(
            dataclasses.replace(card, host=name, gpu=f"GPU-{rank}", node=node.model_copy(update={"links": links}))
        )
    found = gpus_of(ranks)
    assert [gpu.uuid for gpu in found.gpus] == [f"GPU-{rank}" for rank in range(len(names))]
    if len(set(names)) > 1:
        assert tuple(gpu.host for gpu in found.gpus) == hosts_of(ranks)
        for a, one in enumerate(names):
            for b, other in enumerate(names):
                assert found.links[a][b] == ("X" if a == b else "NV18" if one == other else "NET")


def test_a_host_of_which_nothing_is_known_leaves_all_unknown() -> None:
    ranks = cards_on(domain("one_domain"), AllReduceConfig())
    ranks[2:] = [dataclasses.replace(card, node=NodeTopology()) for card in ranks[2:]]
    assert gpus_of(ranks).gpus == ()


def test_hosts_of_one_gpu_in_a_domain_are_joined_by_an_unknown_number_of_links() -> None:
    parts = [domain("one_domain").subset([at]) for at in (0, 2)]
    assert joined(parts, domain=True).links == (("X", "?"), ("?", "X"))
    assert joined(parts).links == (("X", "NET"), ("NET", "X"))


def test_numa_nodes_of_two_hosts_are_not_the_same() -> None:
    ranks = cards_on(domain("one_domain"), AllReduceConfig())
    assert [card.numa_node for card in ranks] == [0, 1, 0, 1]
    assert domains(ranks) == (0, 1, 2, 3)
    assert domains([dataclasses.replace(card, host="one") for card in ranks]) == (0, 1, 0, 1)


def test_copies_of_a_host_make_sense() -> None:
    for name, hosts in (("l40s_x8_two_numa", 2), ("h100_x8_nvswitch", 3)):
        node = NodeTopology.from_json(FOLDER / f"{name}.json")
        copies = repeated(node, hosts)
        assert list(_contradictions(copies)) == []
        assert (copies.hosts, len(copies.gpus)) == (hosts, hosts * len(node.gpus))
        assert copies.links[0][len(node.gpus)] == "NET"
        assert all(gpu.fabric is None for gpu in copies.gpus)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([2], "rank 2"), ([0, 1], "ranks 0-1"), ([0, 2], "ranks 0, 2"), ([0, 1, 2, 5, 7, 8], "ranks 0-2, 5, 7-8")],
)
def test_ranks_in_words(ranks: list[int], text: str) -> None:
    assert ranks_in_words(ranks) == text


FABRICS = st.one_of(
    st.none(),
    st.builds(
        Fabric,
        state=st.sampled_from(("completed", "in progress", "not started", "not supported", "7")),
        status=st.sampled_from(("", "success", "Unknown Error")),
        cluster_uuid=st.sampled_from(("", "0" * 32, "5f" * 16, "5F" * 16, "0b" * 16)),
        clique_id=st.sampled_from((0, 1, 32766)),
        handles=st.sampled_from((None, True, False)),
        imex_channel=st.sampled_from((None, True, False)),
    ),
)


@given(st.lists(FABRICS, min_size=1, max_size=72))
def test_a_verdict_needs_every_rank(fabrics: list[Fabric | None]) -> None:
    """Total; and none is a domain of which a rank says something else."""
    found = domain_obstacle(fabrics)
    if found is None:
        known = [fabric for fabric in fabrics if fabric is not None]
        assert len(known) == len(fabrics)
        assert len({(fabric.cluster_uuid.lower(), fabric.clique_id) for fabric in known}) == 1
        assert all(fabric.state == "completed" and fabric.cluster_uuid.strip("0") for fabric in known)
        assert all(fabric.status in ("", "success") for fabric in known)
        assert not any(fabric.handles is False or fabric.imex_channel is False for fabric in known)
        assert domain_notes(fabrics)
    else:
        assert domain_notes(fabrics) == ()
        # Any rank of another domain, or of none, is enough.
        assert domain_obstacle([*fabrics, fabrics[0]]) is not None


def test_notes_say_what_is_open() -> None:
    assert domain_notes([gpu.fabric for gpu in domain("placeholder_clique").gpus]) == (
        "one NVLink domain over several hosts (5f6c1d3a... clique 32766) as NVML says; proved at the start",
        "clique 32766 is a placeholder: only the cluster UUID tells this domain apart",
    )
    assert domain_notes([gpu.fabric for gpu in domain("completed_without_domain").gpus])[1:] == (
        "not known whether the driver has fabric handles for ranks 0-3",
        "not known whether there is an IMEX channel for ranks 0-3",
    )


# -- NVML --------------------------------------------------------------------------------------------------------------


class FabricNvml(FakeNvml):
    """Says of GPU 0 what a member of a domain would, of GPU 1 what one with an error would."""

    def nvmlDeviceGetGpuFabricInfo(self, handle: int, pointer: Any) -> None:
        info = pointer._obj
        info.cluster_uuid[:] = list(range(1, 17)) if handle == 0 else [0] * 16
        info.status, info.clique_id, info.state = (0, 32766, 3) if handle == 0 else (999, 0, 2)

    class NVMLError(Exception):
        """As pynvml's: the text of a number."""

        def __init__(self, number: int) -> None:
            super().__init__({999: "Unknown Error"}[number])


def test_what_nvml_says_of_a_fabric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FabricNvml())
    monkeypatch.setattr(nvml, "_attribute_by_bus_id", lambda attribute: {":": 1} if attribute == 128 else {})
    monkeypatch.setattr(nvml, "_has_imex_channel", lambda: False)
    first, second = (gpu.fabric for gpu in NodeTopology.detect().gpus)
    assert first == Fabric(
        state="completed",
        status="success",
        cluster_uuid=bytes(range(1, 17)).hex(),
        clique_id=32766,
        handles=True,
        imex_channel=False,
    )
    assert second is not None
    assert (second.state, second.status, second.cluster_uuid) == ("in progress", "Unknown Error", "")


def test_imex_channels_are_those_that_this_user_may_open(tmp_path: Path) -> None:
    assert nvml._has_imex_channel(tmp_path / "none") is False
    assert nvml._has_imex_channel(tmp_path) is False
    (tmp_path / "channel0").touch()
    assert nvml._has_imex_channel(tmp_path) is True


def test_the_structure_is_nvmls() -> None:
    """nvmlGpuFabricInfo_t of nvml.h: 16 bytes of UUID, status, clique, state."""
    assert [(name, getattr(nvml._FabricInfo, name).offset) for name, _ in nvml._FabricInfo._fields_] == [
        ("cluster_uuid", 0),
        ("status", 16),
        ("clique_id", 20),
        ("state", 24),
    ]
    assert ctypes.sizeof(nvml._FabricInfo) == 28
