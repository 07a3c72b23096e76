"""Tuning profiles: which one a group goes by, what decisions say of it, and what a node is recognized by."""

from __future__ import annotations

import dataclasses
import inspect
import random
from pathlib import Path
from typing import Any

import pytest

from llm_allreduce_plugin import AllReduceConfig, ConfigError, NodeTopology
from llm_allreduce_plugin.algorithms.base import Message
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.algorithms.facts import GroupFacts, SlotBytes
from llm_allreduce_plugin.config import load_config
from llm_allreduce_plugin.profiles import search
from llm_allreduce_plugin.profiles.entry import Entry
from llm_allreduce_plugin.profiles.file import Profile, read, store
from llm_allreduce_plugin.runtime.tally import fallbacks_of
from llm_allreduce_plugin.selection.policy import decide, decide_fused, describe, table_of
from llm_allreduce_plugin.selection.sweep import sweep
from llm_allreduce_plugin.topology import NodeIdentity, fingerprint
from llm_allreduce_plugin.topology.links import TopologyClass, Transport
from tests.support.profiles import entry, fused, node
from tests.unit.test_profile import H200, changed

TOPOLOGIES = Path(__file__).parents[2] / "configs" / "topologies"
FACTS = GroupFacts(
    world_size=4,
    device="cuda",
    transport=Transport.SYMMETRIC,
    lanes=264,
    in_band=SlotBytes(1 << 20, 1 << 20),
    architecture=90,
    topology_class=TopologyClass.NVSWITCH,
)


# -- which one is used -------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A cache folder and a folder of shipped profiles, both empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(search, "shipped_paths", lambda: sorted(shipped.glob("*.json")))
    cached = search.cache_path(H200)
    assert cached.is_relative_to(tmp_path)
    return {"cached": cached, "shipped": shipped / "h200.json", "configured": tmp_path / "configured.json"}


def test_configured_then_cached_then_shipped_then_seeds(places: dict[str, Path]) -> None:
    assert search.find(None, FACTS, H200) == search.Found(None)
    elsewhere = dataclasses.replace(H200, fingerprint="elsewhere", description="8 x NVIDIA H200")
    expected = []
    for name, of in (("shipped", elsewhere), ("cached", H200), ("configured", elsewhere)):
        store(places[name], of, [entry(date=f"2025-0{len(expected) + 1}-02T03:04:05+00:00")])
        found = search.find(places["configured"] if name == "configured" else None, FACTS, H200)
        assert found.ignored == ()
        assert found.tuned is not None
        expected.append(found.tuned.source)
    assert expected == [
        "shipped profile h200.json for NVIDIA H200, measured 2025-01-02 in CUDA graphs",
        f"profile {places['cached']}, measured 2025-02-02 in CUDA graphs",
        f"profile {places['configured']}, measured 2025-03-02 in CUDA graphs",
    ]
    assert search.find("none", FACTS, H200) == search.Found(None)


@pytest.mark.parametrize(
    "other",
    (
        {"world_size": 3},
        {"transport": Transport.HOST},
        {"in_band": SlotBytes()},
        {"topology_class": TopologyClass.PCIE_PEER},
    ),
    ids=str,
)
def test_shipped_only_for_the_same_kind_of_group(places: dict[str, Path], other: dict[str, Any]) -> None:
    store(places["shipped"], H200, [entry()])
    assert search.find(None, FACTS, H200).tuned is not None
    assert search.find(None, dataclasses.replace(FACTS, **other), H200).tuned is None
    assert search.find(None, FACTS, node("NVIDIA H100")) == search.Found(None)


def test_a_cached_profile_that_does_not_fit_is_ignored_with_a_line(places: dict[str, Path]) -> None:
    store(places["shipped"], H200, [entry()])
    for spoil, reason in (
        (lambda: places["cached"].write_text("[" * 100_000), "it is nested too deeply"),
        (lambda: changed(places["cached"], schema_version=7), "its schema version is 7"),
        (lambda: changed(places["cached"], fingerprint="copied"), "it was measured on another node"),
        (
            lambda: changed(places["cached"], gpu="NVIDIA L4"),
            "it was measured on NVIDIA L4, and this node has NVIDIA H200",
        ),
    ):
        places["cached"].unlink(missing_ok=True)
        store(places["cached"], H200, [entry()])
        spoil()
        before = places["cached"].read_bytes()
        found = search.find(None, FACTS, H200)
        assert found.tuned is not None
        assert found.tuned.source.startswith("shipped profile")
        (line,) = found.ignored
        assert line.startswith(f"tuning profile {places['cached']}: {reason}")
        assert places["cached"].read_bytes() == before


def test_a_configured_profile_that_cannot_be_used_is_an_error(places: dict[str, Path]) -> None:
    path = places["configured"]
    with pytest.raises(ConfigError, match="tuning_profile: tuning profile .*configured.json: it cannot be read"):
        search.find(path, FACTS, H200)
    store(path, node("NVIDIA L4"), [entry()])
    with pytest.raises(ConfigError, match="it was measured on NVIDIA L4, and this node has NVIDIA H200"):
        search.find(path, FACTS, H200)
    store(path, H200, [entry(world_size=2)], force=True)
    found = search.find(path, FACTS, H200)
    assert found.tuned is None
    assert "it has no entry for 4 ranks through peer memory (it has 2 ranks" in found.ignored[0]


def test_other_architectures_are_other_hardware(places: dict[str, Path]) -> None:
    """Also where GPUs are called the same; a profile that names none, or a node that has none, is told by the name."""
    for name in ("configured", "cached", "shipped"):
        store(places[name], H200, [entry()])
        changed(places[name], architecture=80)
    with pytest.raises(
        ConfigError, match=r"measured on NVIDIA H200 \(sm_80\), and this node has NVIDIA H200 \(sm_90\)"
    ):
        search.find(places["configured"], FACTS, H200)
    found = search.find(None, FACTS, H200)
    assert found.tuned is None
    assert "it was measured on NVIDIA H200 (sm_80), and this node has" in found.ignored[0]
    changed(places["shipped"], architecture=None)
    assert search.find(None, FACTS, H200).tuned is not None
    without = dataclasses.replace(H200, architecture=None)
    assert search.find(places["configured"], FACTS, without).tuned is not None


def test_the_source_of_a_configured_profile_is_named(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ALLREDUCE_TUNING_PROFILE", str(places["configured"]))
    with pytest.raises(
        ConfigError, match="^environment: LLM_ALLREDUCE_TUNING_PROFILE: tuning profile .*cannot be read"
    ):
        search.with_profile(load_config(), FACTS, H200)
    with pytest.raises(ConfigError, match="^vLLM: tuning_profile: tuning profile .*/other.json: it cannot be read"):
        search.with_profile(load_config({"tuning_profile": "/other.json"}, engine_name="vLLM"), FACTS, H200)


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AllReduceConfig().tuning_profile is None
    assert load_config({"tuning_profile": "NONE"}).tuning_profile == "none"
    monkeypatch.setenv("LLM_ALLREDUCE_TUNING_PROFILE", "/a/b.json")
    assert load_config().tuning_profile == Path("/a/b.json")
    with pytest.raises(ConfigError, match="tuning_profile='': must be a file, or none"):
        load_config({"tuning_profile": ""})


def test_shipped_profiles_are_valid() -> None:
    """Whatever lies in configs/tuning can be read, and was measured with this schema."""
    shipped = search.shipped_paths()
    assert {path.name for path in shipped} >= {"nvidia-h100.json", "nvidia-h200-x4.json", "nvidia-h200.json"}
    for path in shipped:
        profile = read(path)
        assert profile.device == "cuda"
        assert profile.entries
        assert path.stat().st_size < 1 << 18, "too large to review"


# -- what it decides ---------------------------------------------------------------------------------------------------


def test_the_reason_names_the_profile_and_what_was_measured() -> None:
    profile = Profile.of(
        H200, [entry(graph=[(4096, "ONESHOT"), (None, "TWOSHOT")], eager=[(None, "ONESHOT")], element_bytes=2)]
    )
    tuned = search._tuned(profile, FACTS, "profile x", anywhere=False)
    facts = dataclasses.replace(FACTS, tuned=tuned)
    for strategy in ("AUTO", "MINLATENCY"):
        config = AllReduceConfig(allreduce_strategy=strategy)  # type: ignore[arg-type]
        decision = decide(config, facts, 4096, "bfloat16")
        said = "8 KiB are more than 4 KiB, where two steps beat one (profile x, measured 2025-01-02 in CUDA graphs)"
        assert said in decision.reason
        # What was not measured for 32-bit elements goes by those of 16 bits.
        assert decide(config, facts, 2048, "float32").launch == decision.launch or strategy == "AUTO"
    assert decide(AllReduceConfig(), facts, 2048, "float32").strategy == "TWOSHOT"


def with_fused(made: Entry, **fields: Any) -> GroupFacts:
    group = dataclasses.replace(FACTS, **fields)
    tuned = search._tuned(Profile.of(H200, [made]), group, "profile x", anywhere=True)
    assert tuned is not None
    return dataclasses.replace(group, tuned=tuned)


def test_a_profile_says_up_to_which_size_one_kernel_is_faster() -> None:
    group = with_fused(entry(fused=fused()))
    small = decide_fused(AllReduceConfig(), group, 64, 8192, "bfloat16")
    assert small.launch is not None
    source = "(profile x, measured 2025-01-02 in CUDA graphs)"
    assert small.reason == f"1 MiB are within 1 MiB, where one kernel is faster than two {source}"
    large = decide_fused(AllReduceConfig(), group, 65, 8192, "bfloat16")
    assert (large.launch, large.by_design) == (None, True), "the faster of two is no fallback"
    assert large.reason == f"1.016 MiB are more than 1 MiB, where two kernels are faster than one {source}"
    assert fallbacks_of(large) == ()
    # What can only run in two is so for that reason; what is not wanted, too.
    assert decide_fused(AllReduceConfig(), group, 2, 8192, "float32").reason.startswith("only 16-bit types")
    assert decide_fused(AllReduceConfig(fuse_norm=False), group, 2, 8192, "bfloat16").reason == "fuse_norm is off"
    # Tuning itself compares both at every size.
    forced = decide_fused(AllReduceConfig(), group, 65, 8192, "bfloat16", however_slow=True)
    assert forced.launch is not None


def test_without_fused_times_the_seeds_decide() -> None:
    for made in (entry(), entry(element_bytes=4, fused=fused([(None, "then-norm")]))):
        decision = decide_fused(AllReduceConfig(), with_fused(made), 4096, 8192, "bfloat16")
        assert decision.launch is not None
        assert "from 1.6 MiB on (4 H200, 4 H100" in decision.reason


def test_cpu_ranks_go_by_eager_calls() -> None:
    """And in graphs or not, all ranks alike: one of the two decides for every call."""
    made = entry(transport=Transport.SHM, in_band=False, fused=fused([(None, "then-norm")], [(None, "fused")]))
    flagged = SlotBytes(1 << 20, 1 << 20)
    shared = with_fused(made, transport=Transport.SHM, device="cpu", lanes=1, in_band=SlotBytes(), flagged=flagged)
    decision = decide_fused(AllReduceConfig(), shared, 4, 8192, "bfloat16")
    assert decision.launch is not None
    assert "where one kernel is faster than two (profile x, measured 2025-01-02 in eager calls)" in decision.reason


@pytest.mark.parametrize(
    ("transport", "runs", "measured"),
    [
        (Transport.SYMMETRIC, "TWOSHOT", "in CUDA graphs"),
        (Transport.HOST, "TWOSHOT", "in CUDA graphs"),
        (Transport.SHM, "ONESHOT", "in eager calls"),
    ],
)
@pytest.mark.parametrize("strategy", ("AUTO", "MINLATENCY"))
def test_one_choice_whether_or_not_a_rank_captures(
    transport: Transport, runs: str, measured: str, strategy: str
) -> None:
    """A rank that captures while another does not must launch the same kernel, or both wait for ever.

    So nothing that a decision is made of can tell the two apart: on GPUs the times in graphs decide for eager calls
    too, and CPU ranks, which have no graphs, go by those of eager calls.
    """
    profile = Profile.of(
        H200, [entry(graph=[(None, "TWOSHOT")], eager=[(None, "ONESHOT")], transport=transport, in_band=True)]
    )
    device = "cpu" if transport is Transport.SHM else "cuda"
    facts = dataclasses.replace(FACTS, transport=transport, device=device, flagged=SlotBytes(1 << 20, 1 << 20))
    facts = dataclasses.replace(facts, tuned=search._tuned(profile, facts, "profile x", anywhere=True))
    config = AllReduceConfig(allreduce_strategy=strategy)  # type: ignore[arg-type]
    kernel = {"TWOSHOT": Algorithm.TWO_SHOT, "ONESHOT": Algorithm.ONE_SHOT}[runs]
    for count in (8, 4096, 1 << 20):
        decision = decide(config, facts, count, "bfloat16")
        assert decision.launch is not None
        assert decision.launch.algorithm is kernel
        assert f"(profile x, measured 2025-01-02 {measured})" in decision.reason
    for function in (decide, describe, table_of, sweep):
        assert "capturing" not in inspect.signature(function).parameters
    # Whether input or output lie in memory that peers see is the same on all ranks, unlike whether a call is captured.
    fields = {field.name for field in dataclasses.fields(Message)}
    assert fields == {"count", "dtype", "element_bytes", "readable_in_place", "registered_output"}


# -- the node ----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_kinds_not_of_devices() -> None:
    """Other serial numbers, another order: the same node. Another link, GPU or peer access: another."""
    topology = NodeTopology.from_json(TOPOLOGIES / "l40s_x8_two_numa.json")
    order = list(range(len(topology.gpus)))
    random.Random(5).shuffle(order)

    def shuffled(matrix: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(matrix[i][j] for j in order) for i in order)

    same = topology.model_copy(
        update={
            "gpus": tuple(
                topology.gpus[old].model_copy(update={"index": new, "uuid": f"GPU-{new}", "pci_bus_id": str(new)})
                for new, old in enumerate(order)
            ),
            "links": shuffled(topology.links),
            "p2p": shuffled(topology.p2p),
            "driver": "1.2.3",
        }
    )
    assert fingerprint(same) == fingerprint(topology)
    seen = {fingerprint(topology)}
    renamed = (topology.gpus[0].model_copy(update={"name": "NVIDIA L4"}), *topology.gpus[1:])
    p2p = [list(row) for row in topology.p2p]
    p2p[0][1] = p2p[1][0] = "CNS"
    links = [list(row) for row in topology.links]
    links[0][1] = links[1][0] = "NV4"
    for change in (
        {"gpus": renamed},
        {"p2p": tuple(map(tuple, p2p))},
        {"links": tuple(map(tuple, links))},
        {"nvswitch": True},
        {"gpus": topology.gpus[:1], "links": (("X",),), "p2p": (("X",),)},
    ):
        seen.add(fingerprint(topology.model_copy(update=change)))
    assert len(seen) == 6


def test_identities() -> None:
    identity = NodeIdentity.of_gpus(NodeTopology.from_json(TOPOLOGIES / "h200_x4_nvswitch.json"))
    assert (identity.name, identity.architecture) == ("NVIDIA H200", 90)
    assert identity.description == "4 x NVIDIA H200; links NV18; NVSwitch"
    blind = NodeIdentity.of_gpus(NodeTopology(), "NVIDIA H200")
    assert blind.name == "NVIDIA H200"
    assert blind.fingerprint != identity.fingerprint
    assert NodeIdentity.of_cpu() == NodeIdentity.of_cpu()
