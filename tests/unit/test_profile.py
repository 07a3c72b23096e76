"""Tuning profiles: written, read, refused, found; and two processes that tune at once."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import multiprocessing
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_allreduce_plugin import AllReduceConfig, ConfigError, NodeTopology, ProfileError
from llm_allreduce_plugin.algorithms.base import Message
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.algorithms.facts import GroupFacts, SlotBytes
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.config import load_config
from llm_allreduce_plugin.profiles import search
from llm_allreduce_plugin.profiles.entry import Entry
from llm_allreduce_plugin.profiles.file import SCHEMA_VERSION, Profile, read, store
from llm_allreduce_plugin.runtime.tally import fallbacks_of
from llm_allreduce_plugin.selection.policy import decide, decide_fused, describe, table_of
from llm_allreduce_plugin.selection.sweep import sweep
from llm_allreduce_plugin.topology import NodeIdentity, fingerprint
from llm_allreduce_plugin.topology.links import TopologyClass, Transport
from tests.support.profiles import entry, fused, node

TOPOLOGIES = Path(__file__).parents[2] / "configs" / "topologies"
H200 = node("NVIDIA H200")
FACTS = GroupFacts(
    world_size=4,
    device="cuda",
    transport=Transport.SYMMETRIC,
    lanes=264,
    in_band=SlotBytes(1 << 20, 1 << 20),
    architecture=90,
    topology_class=TopologyClass.NVSWITCH,
)

limits = st.lists(st.integers(0, 1 << 34), unique=True, max_size=6).map(sorted)


@st.composite
def any_ranges(draw: st.DrawFn) -> list[dict[str, Any]]:
    bounds = [*draw(limits), None]
    return [{"max_bytes": bound, "strategy": draw(st.sampled_from(("ONESHOT", "TWOSHOT")))} for bound in bounds]


any_fused_ranges = st.tuples(
    limits, st.sampled_from(("fused", "then-norm")), st.sampled_from(("fused", "then-norm"))
).map(lambda drawn: [(bound, drawn[1]) for bound in drawn[0]] + [(None, drawn[2])])

any_entry = st.builds(
    lambda graph, eager, measured, **fields: entry(graph=graph, eager=eager, measured=measured, **fields),
    graph=any_ranges(),
    eager=any_ranges(),
    measured=st.lists(
        st.fixed_dictionaries(
            {
                "bytes": st.integers(1, 1 << 34),
                "graph_us": st.dictionaries(st.sampled_from(("ONESHOT", "TWOSHOT")), st.floats(0.1, 1e6)),
                "eager_us": st.dictionaries(st.sampled_from(("ONESHOT", "TWOSHOT")), st.floats(0.1, 1e6)),
            }
        ),
        max_size=4,
    ),
    world_size=st.integers(2, 16),
    transport=st.sampled_from(list(Transport)),
    element_bytes=st.sampled_from((2, 4)),
    in_band=st.booleans(),
    dtype=st.text(max_size=8),
    fused=st.none() | st.builds(fused, any_fused_ranges, any_fused_ranges),
)


@given(st.lists(any_entry, max_size=4, unique_by=lambda made: made.key), st.text(max_size=20))
def test_round_trip(entries: list[Entry], name: str) -> None:
    with fresh_folder() as folder:
        path = folder / "profile.json"
        written = store(path, node(name), entries)
        assert read(path) == written
        assert [file.name for file in folder.iterdir() if not file.name.endswith(".lock")] == ["profile.json"]
    assert sorted(map(repr, written.entries)) == sorted(map(repr, entries))


@contextlib.contextmanager
def fresh_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def written(folder: Path, **fields: Any) -> Path:
    path = folder / "profile.json"
    store(path, H200, [entry(**fields)])
    return path


@given(st.data())
def test_any_truncation_is_refused_by_name(data: st.DataObject) -> None:
    with fresh_folder() as folder:
        path = folder / "profile.json"
        whole = Profile.of(H200, [entry()]).text().encode()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole.rstrip()) - 1))])
        with pytest.raises(ProfileError, match=f"tuning profile {path}: it is not valid JSON"):
            read(path)


@given(st.integers(0, 2**32))
def test_corruption_never_escapes_as_anything_else(seed: int) -> None:
    """Some bytes overwritten: either it is still a valid profile, or the error names the file."""
    whole = bytearray(Profile.of(H200, [entry()]).text().encode())
    dice = random.Random(seed)
    for _ in range(dice.randint(1, 4)):
        whole[dice.randrange(len(whole))] = dice.randrange(256)
    with fresh_folder() as folder:
        path = folder / "profile.json"
        path.write_bytes(whole)
        try:
            read(path)
        except ProfileError as error:
            assert str(error).startswith(f"tuning profile {path}: ")


def changed(path: Path, **fields: Any) -> Path:
    document = json.loads(path.read_text())
    document.update(fields)
    path.write_text(json.dumps(document))
    return path


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    def fault(path: Path) -> str:
        with pytest.raises(ProfileError) as caught:
            read(path)
        return caught.value.reason

    assert fault(tmp_path / "none.json") == "it cannot be read: No such file or directory"
    path = written(tmp_path)
    entries = json.loads(path.read_text())["entries"]
    assert fault(changed(path, schema_version=SCHEMA_VERSION + 1)) == (
        "its schema version is 3, and this package reads 1 to 2 (written by a newer version of this package)"
    )
    assert fault(changed(path, schema="something else")) == "it is no tuning profile"
    for wrong, text in (
        ([{"max_bytes": None, "strategy": "LOWPRECISION"}], "entries.0.graph.0.strategy: Input should be 'ONESHOT' or"),
        ([{"max_bytes": None, "strategy": "NCCL"}], "entries.0.graph.0.strategy: Input should be"),
        ([{"max_bytes": 7, "strategy": "ONESHOT"}], "the last range, and no other, has max_bytes null"),
        ([], "the last range, and no other, has max_bytes null"),
        (
            [{"max_bytes": size, "strategy": "ONESHOT"} for size in (9, 8, None)],
            "max_bytes must rise, not [9, 8]",
        ),
    ):
        broken = [entries[0] | {"graph": wrong}]
        store(path, H200, [entry()], force=True)
        assert text in fault(changed(path, entries=broken))
    store(path, H200, [entry()], force=True)
    assert "two are for the same kind of group" in fault(changed(path, entries=entries * 2))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        ({"graph": [{"max_bytes": None, "runs": "NCCL"}]}, "entries.0.fused.graph.0.runs: Input should be 'fused' or"),
        ({"graph": [{"max_bytes": 7, "runs": "fused"}]}, "graph: the last range, and no other, has max_bytes null"),
        (
            {"eager": [{"max_bytes": size, "runs": "fused"} for size in (9, 8, None)]},
            "eager: max_bytes must rise, not [9, 8]",
        ),
        ({"hidden": 4}, "entries.0.fused.hidden: Input should be greater than or equal to 8"),
        ({"other": 1}, "entries.0.fused.other: Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_what_is_wrong_about_fused_calls_is_named(tmp_path: Path, spoil: dict[str, Any], text: str) -> None:
    path = written(tmp_path, fused=fused())
    entries = json.loads(path.read_text())["entries"]
    entries[0]["fused"] |= spoil
    with pytest.raises(ProfileError) as caught:
        read(changed(path, entries=entries))
    assert text in caught.value.reason


def test_profiles_of_the_first_version_still_load(tmp_path: Path) -> None:
    """They say nothing of fused calls; where an entry is added, the file becomes one of this version."""
    path = written(tmp_path)
    document = json.loads(path.read_text())
    assert "fused" not in document["entries"][0]
    changed(path, schema_version=1)
    (old,) = read(path).entries
    assert old.fused is None
    assert old.ranges().fused == ()
    store(path, H200, [entry(world_size=2, fused=fused())])
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION
    two, four = sorted(read(path).entries, key=lambda made: made.world_size)
    assert four == old
    assert [(found.max_bytes, found.strategy) for found in two.ranges().fused] == [
        (1 << 20, "fused"), (None, "then-norm"),
    ]  # fmt: skip


def test_entries_of_other_groups_are_kept_and_the_same_replaced(tmp_path: Path) -> None:
    path = written(tmp_path, world_size=2)
    store(path, H200, [entry(world_size=4), entry(world_size=2, transport=Transport.HOST)])
    again = store(path, H200, [entry(world_size=2, dtype="float16")])
    assert len(again.entries) == 3
    assert [made.dtype for made in again.entries if made.key == entry(world_size=2).key] == ["float16"]


@pytest.mark.parametrize("kind", ("corrupt", "future", "foreign", "other links"))
def test_never_replaced_unasked(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path)
    mine = H200
    if kind == "corrupt":
        path.write_text("{")
    elif kind == "future":
        changed(path, schema_version=99)
    elif kind == "foreign":
        mine = node("NVIDIA L40S")
    else:
        mine = dataclasses.replace(H200, fingerprint="other", description="other links")
    before = path.read_bytes()
    with pytest.raises(ProfileError, match=str(path)):
        store(path, mine, [entry()])
    assert path.read_bytes() == before
    store(path, mine, [entry()], force=True)
    assert read(path).gpu == mine.name


def test_tune_refuses_before_it_measures(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("not a profile")
    result = CliRunner().invoke(app, ["tune", "--cpu", "--quick", "--output", str(path)])
    assert result.exit_code == 2
    assert f"tuning profile {path}: it is not valid JSON" in result.output
    assert "not replaced without --force" in result.output
    assert path.read_text() == "not a profile"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot be written"):
        store(tmp_path / "file" / "profile.json", H200, [entry()])


def _store_many(path: Path, first: int, count: int) -> None:
    for number in range(count):
        store(path, H200, [entry(world_size=2 + first + 2 * number)])


def test_processes_that_tune_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profile.json"
    context = multiprocessing.get_context("spawn")
    count = 15
    processes = [context.Process(target=_store_many, args=(path, first, count)) for first in (0, 1)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if path.exists():
            read(path)  # never half of one
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [made.world_size for made in sorted(read(path).entries, key=lambda made: made.world_size)] == list(
        range(2, 2 + 2 * count)
    )
    assert not list(path.parent.glob(".*.json.[!l]*")), "no partial file is left"


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
    assert "it says nothing about 4 ranks through symmetric memory (but about 2 ranks" in found.ignored[0]


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AllReduceConfig().tuning_profile is None
    assert load_config({"tuning_profile": "NONE"}).tuning_profile == "none"
    monkeypatch.setenv("LLM_ALLREDUCE_TUNING_PROFILE", "/a/b.json")
    assert load_config().tuning_profile == Path("/a/b.json")
    with pytest.raises(ConfigError, match="tuning_profile='': must be a file, or none"):
        load_config({"tuning_profile": ""})


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
        assert "one kernel or two was not measured for 4 ranks" in decision.reason


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
    # Whether the input lies in memory that peers see is the same on all ranks, unlike whether a call is captured.
    fields = {field.name for field in dataclasses.fields(Message)}
    assert fields == {"count", "dtype", "element_bytes", "readable_in_place"}


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


def test_shipped_profiles_are_valid() -> None:
    """Whatever lies in configs/tuning can be read, and was measured with this schema."""
    for path in search.shipped_paths():
        profile = read(path)
        assert profile.device == "cuda"
        assert profile.entries
        assert path.stat().st_size < 1 << 18, "too large to review"
