"""What the compiled kernels ask of the switch: exact ones no sum, the one that sums there fp32 at least.

No order of a sum in the switch is known, and without ``.acc::f32`` it is rounded to 16 bits after each term: a kernel
of the exact classes that had one would give other bits, on hardware that no test here has.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from tests.support import kernel_list
from tests.support.cuda_tools import cubins, disassembled, library_path, machine_code, ptx_of_kernels, tool

NAME = "two_shot_in_switch_kernel"
FIRST = 90  # the architecture that came with sums in the switch
EXPECTED = {kernel for kernel, _ in kernel_list.expected() if kernel.name == NAME}
SUM_IN_PTX = re.compile(r"\bmultimem\.(?:ld_reduce|red)\b\S*")
PTX_OF_SUMS = {
    "fp32": "multimem.ld_reduce.relaxed.sys.global.add.v4.f32",
    "fp16": "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2",
    "bf16": "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2",
}
# A load from multicast memory that sums, and its first word of two, whose low 12 bits say what an instruction does.
SUM_IN_SASS = re.compile(r"\b(LDGMC\.\S+) .*?/\* 0x([0-9a-f]{16}) \*/")
OPCODE = 0xFFF
# By type, on every architecture. In 16 bits, "ADD" would be a sum in 16 bits; F32ADD and HPADD are those of .acc::f32.
SASS_OF_SUMS = {
    "fp32": re.compile(r"LDGMC\.E\.ADD\.F32x4\."),
    "fp16": re.compile(r"LDGMC\.E\.(?:F32ADD|HPADD)\.F16x8\."),
    "bf16": re.compile(r"LDGMC\.E\.(?:F32ADD|HPADD)\.BF16x8\."),
}


def in_switch_kernel(mangled: str) -> kernel_list.Kernel | None:
    kernel = kernel_list.kernel_of(mangled)
    return kernel if kernel is not None and kernel.name == NAME else None


def test_ptx() -> None:
    """Of each architecture of which the library holds PTX."""
    seen: dict[str, set[kernel_list.Kernel]] = {}
    kernels = ptx_of_kernels(library_path())
    assert len({name for _, name in kernels}) > len(EXPECTED)
    for (architecture, name), ptx in kernels.items():
        sums = set(SUM_IN_PTX.findall(ptx))
        kernel = in_switch_kernel(name)
        if kernel is None or int(architecture) < FIRST:
            assert not sums, f"sm_{architecture}: {name} must not sum in the switch"
            continue
        assert sums == {PTX_OF_SUMS[kernel.type]}, f"sm_{architecture}: {kernel} must sum in fp32"
        seen.setdefault(architecture, set()).add(kernel)
    assert seen
    assert all(found == EXPECTED for found in seen.values())


@pytest.mark.skipif(tool("nvdisasm") is None, reason="nvdisasm is missing: pip install '.[test]'")
def test_machine_code(tmp_path: Path) -> None:
    """Of each architecture: what these sums look like is read from the kernels that sum in the switch."""
    code = {
        (architecture, name): instructions
        for architecture, cubin in cubins(library_path(), tmp_path)
        for name, instructions in machine_code(cubin).items()
    }
    listings = {
        (architecture, name): listing
        for architecture, cubin in cubins(library_path(), tmp_path)
        if int(architecture) >= FIRST and any(in_switch_kernel(name) for name in machine_code(cubin))
        for name, listing in disassembled(cubin).items()
    }
    for architecture in sorted({architecture for architecture, _ in code if int(architecture) >= FIRST}):
        opcodes = set()
        found = set()
        for name in (name for listed, name in listings if listed == architecture):
            kernel = in_switch_kernel(name)
            sums = SUM_IN_SASS.findall(listings[architecture, name])
            assert kernel is not None, f"sm_{architecture}: {name} lies beside the kernels that sum in the switch"
            assert sums, f"sm_{architecture}: {kernel} must sum in the switch"
            for instruction, word in sums:
                assert SASS_OF_SUMS[kernel.type].match(instruction), f"sm_{architecture}: {kernel}: {instruction}"
                opcodes.add(int(word, 16) & OPCODE)
            found.add(kernel)
        assert found == EXPECTED, f"sm_{architecture}"
        exact = 0
        for name in (name for held, name in code if held == architecture):
            words = struct.iter_unpack("<QQ", code[architecture, name])
            has_sum = any(first & OPCODE in opcodes for first, _ in words)
            assert has_sum == (in_switch_kernel(name) is not None), f"sm_{architecture}: {name}"
            exact += not has_sum
        assert exact > len(EXPECTED)
