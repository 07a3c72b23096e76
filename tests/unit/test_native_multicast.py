"""Kernels that go by multicast, as compiled; where things lie in its memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import _C
from tests.support import kernel_list
from tests.support.cuda_tools import cubins, cuobjdump, disassembled, library_path, machine_code, tool

OLDEST_WITH_MULTICAST = 90
IN_SWITCH = "two_shot_in_switch_kernel"
BY_MULTICAST = re.compile(r"(?:one|two)_shot_multicast_\w*kernel")
# What goes to all ranks: PTX allows nothing else at an address of multicast memory.
STORE = "multimem.st.relaxed.sys.global.v4.f32"
# Of each type, what the switch is told: fp32 sums of 16-bit values, too.
SUMS = {
    "fp32": "multimem.ld_reduce.relaxed.sys.global.add.v4.f32",
    "fp16": "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2",
    "bf16": "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2",
}


def entries(ptx: str) -> Iterator[tuple[kernel_list.Kernel, list[str]]]:
    """Each all-reduce kernel, and its instructions that only multicast memory has."""
    for part in ptx.split(".entry ")[1:]:
        name = part.split("(", 1)[0]
        kernel = kernel_list.kernel_of(name)
        if kernel is not None:
            yield kernel, re.findall(r"\b(?:multimem|red\.async\.\S*multimem)\S*", part)


def check(ptx: str) -> tuple[int, int]:
    """That kernels ask of the switch what they are named for: how many have it sum, and how many copy alone."""
    summing = copying = 0
    for kernel, found in entries(ptx):
        if kernel.name == IN_SWITCH:
            summing += 1
            assert set(found) == {SUMS[kernel.type], STORE}, f"{kernel}: {found}"
        elif BY_MULTICAST.fullmatch(kernel.name):
            copying += 1
            assert set(found) == {STORE}, f"{kernel} is exact, and has the switch copy what is for all: {found}"
        else:
            assert not found, f"{kernel} pushes, and asks something of the switch: {found}"
    return summing, copying


def test_kernels_ask_of_the_switch_what_they_are_named_for() -> None:
    """As the library holds them: in the PTX that machine code of every architecture with multicast is made from."""
    if max(map(int, re.findall(r"sm_(\d+)", cuobjdump("--list-ptx", library_path())))) < OLDEST_WITH_MULTICAST:
        pytest.skip("built for GPUs without multicast, for which these kernels are empty")
    ptx = cuobjdump("--dump-ptx", library_path())
    kernels = {kernel for kernel, _ in entries(ptx)}
    assert {kernel for kernel, _ in kernel_list.expected()} <= kernels
    copying = [kernel for kernel, _ in kernel_list.expected() if BY_MULTICAST.fullmatch(kernel.name)]
    assert check(ptx) == (len(SUMS) * 4, len(copying))


@pytest.mark.skipif(tool("nvdisasm") is None, reason="nvdisasm is missing: pip install '.[test]'")
def test_stores_to_all_are_plain_ones_to_the_machine(tmp_path: Path) -> None:
    """tests/gpu/test_multishot.py gives these kernels an ordinary address; if this fails, it needs its own kernels."""

    def copies(name: str) -> bool:
        kernel = kernel_list.kernel_of(name)
        return kernel is not None and BY_MULTICAST.fullmatch(kernel.name) is not None

    for architecture, cubin in cubins(library_path(), tmp_path):
        if int(architecture) < OLDEST_WITH_MULTICAST or not any(map(copies, machine_code(cubin))):
            continue
        for name, listing in disassembled(cubin).items():
            if copies(name):
                assert "STG.E.128.STRONG.SYS" in listing
                asked = re.findall(r"\b[A-Z]+MC\b\S*|\b\w*MULTIMEM\S*", listing)
                assert not asked, f"sm_{architecture}: {name} has instructions that are of multicast memory: {asked}"


@given(st.integers(-1, 80), st.integers(-1, 1 << 26), st.booleans())
def test_layout_fits_or_is_refused(world_size: int, size: int, in_switch: bool) -> None:
    try:
        layout = _C.make_multicast_layout(world_size, size, in_switch=in_switch)
    except ValueError as error:
        assert f"world_size={world_size}, bytes={size}" in str(error)
        return
    assert world_size in range(2, 73)
    assert layout.total_bytes == size
    slots = 2 * world_size * layout.one_shot_bytes
    assert layout.one_shot_offset + slots <= layout.results_offset
    assert layout.results_offset + layout.results_bytes <= layout.inputs_offset
    assert layout.inputs_offset + layout.inputs_bytes <= max(size, layout.inputs_offset)
    assert layout.results_offset + layout.results_bytes <= size
    for part in (layout.one_shot_bytes, layout.results_bytes // world_size):
        assert part >= _C.VECTOR_BYTES
        assert part % _C.VECTOR_BYTES == 0
    assert (layout.inputs_bytes >= world_size * _C.VECTOR_BYTES) == in_switch
