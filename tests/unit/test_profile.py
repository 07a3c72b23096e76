"""Tuning profiles: written, read, refused, never replaced unasked; and two processes that tune at once."""

from __future__ import annotations

import contextlib
import dataclasses
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

from llm_allreduce_plugin import ProfileError
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.profiles.entry import Entry
from llm_allreduce_plugin.profiles.file import SCHEMA_VERSION, Profile, read, store
from llm_allreduce_plugin.topology.links import Transport
from tests.support.profiles import cpu_entry, entry, fused, node, registered

TOPOLOGIES = Path(__file__).parents[2] / "configs" / "topologies"
H200 = node("NVIDIA H200")
# Of one line, as every text of a profile is.
lines = st.text(max_size=20).filter(str.isprintable)
limits = st.lists(st.integers(0, 1 << 34), unique=True, max_size=6).map(sorted)


@st.composite
def any_ranges(draw: st.DrawFn) -> list[dict[str, Any]]:
    bounds = [*draw(limits), None]
    return [{"max_bytes": bound, "strategy": draw(st.sampled_from(("ONESHOT", "TWOSHOT")))} for bound in bounds]


any_fused_ranges = st.tuples(
    limits, st.sampled_from(("fused", "then-norm")), st.sampled_from(("fused", "then-norm"))
).map(lambda drawn: [(bound, drawn[1]) for bound in drawn[0]] + [(None, drawn[2])])

placing = st.sampled_from(("ONESHOT", "TWOSHOT", "UB"))


@st.composite
def any_registered(draw: st.DrawFn) -> dict[str, Any]:
    def ranges() -> list[dict[str, Any]]:
        return [{"max_bytes": bound, "strategy": draw(placing)} for bound in (*draw(limits), None)]

    return {"graph": ranges(), "eager": ranges()}


any_entry = st.builds(
    lambda graph, eager, measured, **fields: entry(graph=graph, eager=eager, measured=measured, **fields),
    graph=any_ranges(),
    eager=any_ranges(),
    measured=st.lists(
        st.fixed_dictionaries(
            {
                "bytes": st.integers(1, 1 << 34),
                "graph_us": st.dictionaries(placing, st.floats(0.1, 1e6)),
                "eager_us": st.dictionaries(placing, st.floats(0.1, 1e6)),
            }
        ),
        max_size=4,
    ),
    world_size=st.integers(2, 16),
    transport=st.sampled_from(list(Transport)),
    element_bytes=st.sampled_from((2, 4)),
    in_band=st.booleans(),
    dtype=lines,
    fused=st.none() | st.builds(fused, any_fused_ranges, any_fused_ranges),
    registered=st.none() | any_registered(),
)


@given(st.lists(any_entry, max_size=4, unique_by=lambda made: made.key), lines)
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
        "its schema version is 5, and this package reads 1 to 4 (written by a newer version of this package)"
    )
    assert fault(changed(path, schema="something else")) == "it is no tuning profile"
    for wrong, text in (
        ([{"max_bytes": None, "strategy": "LOWPRECISION"}], "entries.0.graph.0.strategy: Input should be 'ONESHOT' or"),
        ([{"max_bytes": None, "strategy": "NCCL"}], "entries.0.graph.0.strategy: Input should be"),
        ([{"max_bytes": None, "strategy": "UB"}], "entries.0.graph.0.strategy: Input should be 'ONESHOT' or 'TWOSHOT'"),
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
        (
            {"environment": {"gpu": "\x1b]0;title\x07"}},
            "environment.gpu: must be one line of printable characters, not",
        ),
        ({"environment": {"a\nb": ""}}, "environment.a\\nb.[key]: must be one line of printable characters"),
        ({"date": "2025-01-02\nforged"}, "date: must be one line of printable characters, not '2025-01-02\\nforged'"),
        ({"dtype": "x" * 1001}, "dtype: must have at most 1000 characters"),
        ({"method": "\ud800"}, ""),
        ({"in_band": 0}, "in_band: Input should be a valid boolean, not 0"),
        ({"hosts": True}, "hosts: Input should be a valid integer, not True"),
        ({"world_size": "4"}, "world_size: Input should be a valid integer, not '4'"),
        ({"measured": [{"bytes": 1, "graph_us": {"ONESHOT": -1.0}}]}, "measured.0.graph_us.ONESHOT: Input should be "),
        (
            {"measured": [{"bytes": 1, "eager_us": {"UB": "1"}}]},
            "measured.0.eager_us.UB: Input should be a valid number",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_about_an_entry_is_named_with_its_value(tmp_path: Path, spoil: dict[str, Any], text: str) -> None:
    path = written(tmp_path)
    entries = json.loads(path.read_text())["entries"]
    entries[0] |= spoil
    with pytest.raises(ProfileError) as caught:
        read(changed(path, entries=entries))
    where = f"entries.0.{text}" if text else ""
    assert f"it is no tuning profile: {where}" in caught.value.reason
    assert caught.value.reason.isprintable()


@pytest.mark.parametrize("field", ("gpu", "node", "fingerprint"))
def test_what_is_wrong_about_a_node_is_named_with_its_value(tmp_path: Path, field: str) -> None:
    path = changed(written(tmp_path), **{field: "H200\x1b[31m"})
    with pytest.raises(ProfileError, match=rf"{field}: must be one line of printable characters, not 'H200\\x1b\[31m'"):
        read(path)


def test_a_wrong_version_is_told_in_few_words(tmp_path: Path) -> None:
    path = written(tmp_path)
    for version in ("9" * 5000, 10**4000, [0] * 5000, {"\x1b": "\x1b"}):
        with pytest.raises(ProfileError, match="its schema version is .*, and this package reads 1 to 4") as caught:
            read(changed(path, schema_version=version))
        assert len(caught.value.reason) < 300
        assert caught.value.reason.isprintable()
    for version in (True, 1.0, "1"):
        with pytest.raises(ProfileError, match=f"its schema version is {version!r}, and this package reads 1 to 4"):
            read(changed(path, schema_version=version))


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


def test_profiles_of_the_third_version_still_load(tmp_path: Path) -> None:
    """They say nothing of registered outputs."""
    path = written(tmp_path, fused=fused())
    document = json.loads(path.read_text())
    assert "registered" not in document["entries"][0]
    changed(path, schema_version=3)
    (old,) = read(path).entries
    assert old.registered is None
    assert old.ranges().registered == ()
    assert old.fused is not None


def test_what_is_said_of_registered_outputs_is_kept_and_decides(tmp_path: Path) -> None:
    in_graphs, eager = ((1 << 20, "ONESHOT"), (None, "UB")), ((None, "TWOSHOT"),)
    path = written(tmp_path, registered=registered(in_graphs, eager))
    (made,) = read(path).entries
    assert [(found.max_bytes, found.strategy) for found in made.ranges().registered] == list(in_graphs)
    of_cpu = cpu_entry(2, registered=registered(in_graphs, eager))
    assert [(found.max_bytes, found.strategy) for found in of_cpu.ranges().registered] == list(eager)


def test_what_is_wrong_about_registered_outputs_is_named(tmp_path: Path) -> None:
    for graph, text in (
        (((None, "NCCL"),), "entries.0.registered.graph.0.strategy: Input should be 'ONESHOT', 'TWOSHOT' or 'UB'"),
        (((7, "UB"),), "graph: the last range, and no other, has max_bytes null"),
        (((9, "UB"), (8, "TWOSHOT"), (None, "UB")), "graph: max_bytes must rise, not [9, 8]"),
    ):
        path = written(tmp_path)
        entries = json.loads(path.read_text())["entries"]
        entries[0]["registered"] = registered(graph, ((None, "UB"),))
        with pytest.raises(ProfileError) as caught:
            read(changed(path, entries=entries))
        assert text in caught.value.reason
        path.unlink()


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


def test_an_entry_of_hosts_serves_no_group_of_one() -> None:
    facts = GroupFacts(4, "cuda", Transport.SYMMETRIC, hosts=(0, 0, 1, 1))
    one, two = entry(in_band=False), entry(in_band=False, hosts=2)
    assert two.serves(facts) and not one.serves(facts)
    for joined in (dataclasses.replace(facts, hosts=(0,) * 4), dataclasses.replace(facts, fabric=True)):
        assert one.serves(joined) and not two.serves(joined), "an NVLink domain is like one host"
    assert not two.serves(dataclasses.replace(facts, hosts=(0, 1, 2, 3)))
    assert one.key != two.key
    assert str(two) == "4 ranks on 2 hosts, peer memory, 16-bit elements"
