"""What bounds the way through host memory: PCIe alone, both ways at once, and an exchange over it of two GPUs.

    python benchmarks/host_link.py --gpus 2 --out benchmarks/h200/host_link_tp2.json

Compiles benchmarks/host_link.cu, which says what is measured, with nvcc. Microseconds of a call in a CUDA graph, the
median of 7 graphs on the slowest GPU; ``wrong``: elements of both outputs that are not the sum. Of all shapes that were
tried the fastest are kept, and how many were tried.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin.measure.environment import write_record

SOURCE = Path(__file__).with_suffix(".cu")
KEPT = 4
MOST_GPUS = 8  # kMostGpus there


def measured(gpus: int) -> list[dict[str, Any]]:
    """All shapes of the program, which is compiled for the first GPU."""
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / SOURCE.stem
        command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-o", str(program), str(SOURCE)]
        subprocess.run(command, check=True)  # noqa: S603
        said = subprocess.run([program, str(gpus)], check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603
    return [json.loads(line) for line in said.splitlines()]


def fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kind and size the KEPT fastest, with how many there were."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["bytes"], row["what"]), []).append(row)
    return [
        row | {"shapes_tried": len(group)}
        for group in groups.values()
        for row in sorted(group, key=lambda row: float(row["us"]))[:KEPT]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="2 to 8")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not 2 <= arguments.gpus <= min(MOST_GPUS, torch.cuda.device_count()):
        parser.error(f"--gpus {arguments.gpus}: 2 to {MOST_GPUS} of the {torch.cuda.device_count()} that there are")
    rows = fastest(measured(arguments.gpus))
    for row in rows:
        shape = f"{row['storing_blocks']} + {row['loading_blocks']} x {row['threads']} x {row['vectors']}"
        print(f"{row['bytes'] >> 10:>6}K {row['what']:>8} {row['us']:>8.2f} us  {shape}  wrong {row['wrong']}")
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__, world_size=arguments.gpus)
    sys.exit(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    main()
