"""The folder in which emulated libraries are kept: what was not used for long goes, all else stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support import emulator, kept

OLD_S = kept.UNUSED_S + kept.DAY_S


def make(path: Path, age_s: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("built")
    then = time.time() - age_s
    for one in (path, path.parent):
        os.utime(one, (then, then))
    return path


def test_what_was_not_used_for_long_goes(tmp_path: Path) -> None:
    make(tmp_path / "old" / "_C.so", OLD_S)
    make(tmp_path / "new" / "_C.so", kept.DAY_S)
    kept.use(make(tmp_path / "used" / "_C.so", OLD_S))
    make(tmp_path / "objects" / "a.o", OLD_S)
    make(tmp_path / "objects" / "b.o", 0.0)
    assert kept.prune(tmp_path / "objects") == ["a.o"]
    assert kept.prune(tmp_path) == ["old"]
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "used", "objects", "b.o", "_C.so"}
    assert kept.prune(tmp_path / "none") == []


def test_a_build_prunes_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finds its library there deletes nothing, and says that it is used."""
    monkeypatch.setenv("ALLREDUCE_EMULATOR_CACHE", str(tmp_path))
    made: list[Path] = []

    def link(_sources: Path, _domain: str, target: Path) -> None:
        target.write_text("a library")
        made.append(target)

    monkeypatch.setattr(emulator, "_link", link)
    old, object_ = make(tmp_path / "0" / "_C.so", OLD_S), make(tmp_path / "objects" / "0.o", OLD_S)
    library = emulator.build()
    assert len(made) == 1
    assert library.read_text() == "a library"
    assert not old.exists()
    assert not object_.exists()
    old = make(old, OLD_S)
    make(library, OLD_S)
    assert emulator.build() == library
    assert len(made) == 1
    assert old.exists()
    assert time.time() - library.stat().st_mtime < kept.DAY_S
