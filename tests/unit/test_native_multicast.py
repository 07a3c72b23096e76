"""Kernels that go by multicast, as compiled; where things lie in its memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import _C
from tests.support import kernel_list
from tests.support.cuda_tools import cuobjdump, library_path

OLDEST_WITH_MULTICAST = 90
IN_SWITCH = "two_shot_in_switch_kernel"
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


def check(ptx: str) -> int:
    """That no kernel but those that are named for it sums in the switch; how many do."""
    summing = 0
    for kernel, found in entries(ptx):
        if kernel.name == IN_SWITCH:
            summing += 1
            assert found, f"{kernel}: must sum in the switch"
            assert set(found) == {SUMS[kernel.type]}, f"{kernel}: {found}"
        else:
            assert not found, f"{kernel} is exact, and sums in the switch: {found}"
    return summing


def test_exact_kernels_do_not_sum_in_the_switch() -> None:
    """As the library holds them: in the PTX that machine code of every architecture with multicast is made from."""
    if max(map(int, re.findall(r"sm_(\d+)", cuobjdump("--list-ptx", library_path())))) < OLDEST_WITH_MULTICAST:
        pytest.skip("built for GPUs without multicast, for which these kernels are empty")
    ptx = cuobjdump("--dump-ptx", library_path())
    kernels = {kernel for kernel, _ in entries(ptx)}
    assert {kernel for kernel, _ in kernel_list.expected()} <= kernels
    assert check(ptx) == len(SUMS) * 4


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
