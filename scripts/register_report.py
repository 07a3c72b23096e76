"""Registers, stack and local memory of every kernel in the built library, as a table.

    python scripts/register_report.py [libllm_allreduce.so] > docs/registers.md

Of the installed package, or of the library named. Needs cuobjdump (CUDA toolkit, or the wheel of the test extra).
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.cuda_tools import kernel_resources, library_path

TYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
NAME = re.compile(
    r"(?P<kernel>(?:(?:one|two)_shot_(?:(?:in_band|short|split|pull|published|staged)_)?"
    r"|low_precision_(?:(?:fp8|published|staged|ring|hierarchical)_)?)"
    r"kernel)I(?P<type>f|6__half|13__nv_bfloat16)(?:Li(?P<ranks>\d+)E)?(?P<packet>\S*)"
)
ANY = 1000  # in the place of a number of ranks: one kernel serves them all
FORMATS = {"Fp8Packet": "fp8", "Tq3": "tq3", "Hadamard2": "hadamard2"}


def main() -> None:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else library_path()
    table: dict[tuple[str, str, int], dict[int, int]] = defaultdict(dict)
    for resource in kernel_resources(library):
        match = NAME.search(resource.name)
        if match is None:
            continue
        if resource.stack or resource.local:
            sys.exit(f"{resource.name} on sm_{resource.architecture}: {resource.stack} bytes of stack")
        wire = next((wire for name, wire in FORMATS.items() if name in match["packet"]), None)
        kernel = f"{match['kernel']}, {wire}" if wire else match["kernel"]
        key = (kernel, TYPES[match["type"]], int(resource.architecture))
        table[key][int(match["ranks"] or ANY)] = resource.registers
    ranks = sorted({rank for row in table.values() for rank in row})
    print("# Registers per thread\n")
    print("Every kernel for every number of ranks; blocks have at most 512 threads, which 128 registers fit; those of")
    print("the published kernels and of those that wait for flags (without a middle name, ring, hierarchical) at most")
    print("288, which 224 fit; of the staged kernels at most 256, which 255 fit.")
    print("No kernel has a stack frame or spills (`tests/unit/test_native.py` checks that for the architectures of the")
    print("build at hand).")
    print("Made by `scripts/register_report.py` from a build with nvcc 13.0.\n")
    print("| kernel | type | sm | " + " | ".join("any" if rank == ANY else str(rank) for rank in ranks) + " |")
    print("|---|---|---|" + "---|" * len(ranks))
    for (kernel, dtype, architecture), row in sorted(table.items()):
        cells = " | ".join(str(row.get(rank, "")) for rank in ranks)
        print(f"| `{kernel}` | {dtype} | {architecture} | {cells} |")


if __name__ == "__main__":
    main()
