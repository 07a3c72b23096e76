"""What the emulator needs of csrc/: that all that is the hardware's has one place, which it can replace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.emulator import EMULATOR, SOURCES

KERNEL_FILES = sorted([*SOURCES.rglob("*.cu"), *SOURCES.rglob("*.cuh")])
REPLACED = ("device/ptx.cuh", "device/kernel_address.cuh")
NAMES = re.compile(r"\b(asm|__shared__|__ldcg|__cvta_\w+)\b|<<<|reinterpret_cast<const void\*>\(")


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_the_hardware_has_one_place(path: Path) -> None:
    name = path.relative_to(SOURCES).as_posix()
    code = re.sub(r"//.*", "", path.read_text())
    found = sorted({match[0] for match in NAMES.finditer(code)})
    if name in REPLACED:
        assert found, "nothing of the hardware is left here: the pattern no longer fits"
        return
    assert not found, f"csrc/{name} has {found}: give it a name in csrc/device/ptx.cuh, or use kernel_address()"


def test_the_emulator_has_every_function() -> None:
    """And no other: one that is gone there is gone here."""
    real, emulated = (
        set(re.findall(r"\b(\w+)\((?:[^()]*)\) \{", (folder / "device" / "ptx.cuh").read_text()))
        for folder in (SOURCES, EMULATOR / "include")
    )
    assert len(real) > 15
    assert real <= emulated, f"missing in tests/emulator/include/device/ptx.cuh: {sorted(real - emulated)}"
    assert emulated - real <= {"shared_variable"}, sorted(emulated - real)
