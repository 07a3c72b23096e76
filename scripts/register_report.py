"""Registers, stack and local memory of every kernel in the built library, as a table.

    python scripts/register_report.py [libllm_allreduce.so] > build/registers.md

scripts/test.sh writes it there. Of the installed package, or of the library named. Needs cuobjdump (CUDA toolkit, or
the wheel of the test extra).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.cuda_tools import kernel_resources, library_path
from tests.support.kernel_list import ANY, kernel_of


def main() -> None:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else library_path()
    table: dict[tuple[str, str, str, int], dict[int, str]] = defaultdict(dict)
    for resource in kernel_resources(library):
        kernel = kernel_of(resource.name)
        if kernel is not None:
            key = (kernel.name, kernel.wire, kernel.type, int(resource.architecture))
            spilled = f" ({resource.stack + resource.local} B)" if resource.stack or resource.local else ""
            table[key][kernel.world_size] = f"{resource.registers}{spilled}"
        elif resource.stack or resource.local:
            sys.exit(f"{resource.name} on sm_{resource.architecture}: {resource.stack} bytes of stack")
    ranks = sorted({rank for row in table.values() for rank in row}, key=lambda rank: (rank == ANY, rank))
    print("# Registers per thread\n")
    print(
        "Every all-reduce kernel, by the world size that it is compiled for; `any`: known at run time. Blocks have at"
    )
    print(
        "most 512 threads, which 128 registers fit, wide ones 1024, which 64 fit; those of the shared and the flagged"
    )
    print("kernels at most 288, which 168")
    print("fit; those of the ring and of the staged kernels at most 256, which 255 fit.")
    print(
        "Bytes of stack, where registers did not suffice, stand behind them. `tests/unit/test_native.py` fails for each"
    )
    print("of these when it is given a build for that architecture.")
    print("Made by `scripts/register_report.py`.\n")
    print("| kernel | wire | type | sm | " + " | ".join("any" if rank == ANY else str(rank) for rank in ranks) + " |")
    print("|---|---|---|---|" + "---|" * len(ranks))
    for (kernel, wire, dtype, architecture), row in sorted(table.items()):
        cells = " | ".join(str(row.get(rank, "")) for rank in ranks)
        print(f"| `{kernel}` | {wire} | {dtype} | {architecture} | {cells} |")


if __name__ == "__main__":
    main()
