"""How long a matrix product takes where its input or its output lies elsewhere.

    python benchmarks/product_places.py --out benchmarks/h100/product_places.json

The product is that of a Llama's gate and up projections, [m, 8192] x [8192, 28672] in bf16, by cuBLAS, 12 in a row in a
CUDA graph. ``moved: input``: the input lies at each of a row of places, 512 KiB apart, of one piece of memory, and the
output stays where it is. ``moved: output``: the other way. ``moved: input, padded``: as the first, with 64 elements
between rows of the input. ``us``: for each place in turn, the median of the replays; what is in the caches and which
kernel runs are the same for all places.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.product_behind import HIDDEN, OUT, ROWS, microseconds

STEP_BYTES = 512 << 10
PLACES = 96
PADDING = 64
MOVED = ("input", "output", "input, padded")


def placed(arena: Any, place: int, rows: int, columns: int, padding: int = 0) -> Any:  # noqa: ANN401
    """``[rows, columns]`` at that place of ``arena``, a flat tensor, with ``padding`` elements between rows."""
    first = place * STEP_BYTES // arena.element_size()
    pitch = columns + padding
    return arena[first : first + rows * pitch].view(rows, pitch)[:, :columns]


def scan(weight: Any, arena: Any, rows: int, moved: str) -> dict[str, Any]:  # noqa: ANN401
    """One line of the record. ``weight``: bf16 [OUT, HIDDEN]. ``arena``: flat, bf16."""
    import torch

    source = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    product = torch.empty(rows, OUT, device="cuda", dtype=torch.bfloat16)
    times = []
    for place in range(PLACES):
        used, out = source, product
        if moved == "output":
            out = placed(arena, place, rows, OUT)
        else:
            used = placed(arena, place, rows, HIDDEN, PADDING if "padded" in moved else 0)
            used.copy_(source)

        def run(_: Any, used: Any = used, out: Any = out) -> None:  # noqa: ANN401
            torch.mm(used, weight.t(), out=out)

        times.append(round(microseconds(run), 1))
    return {"rows": rows, "moved": moved, "us": times}


def summary(row: dict[str, Any]) -> str:
    """A line for reading: the fastest, the median and the slowest, and how many take 2 % more than the fastest."""
    times = row["us"]
    slow = sum(time > 1.02 * min(times) for time in times)
    ends = f"{min(times)} / {statistics.median(times)} / {max(times)} us"
    return f"{row['rows']:4d} rows, moved {row['moved']}: {ends}; {slow} of {len(times)} places 2 % above the fastest"


def lines(weight: Any, arena: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401
    """All of the record."""
    for rows in ROWS:
        for moved in MOVED:
            yield scan(weight, arena, rows, moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    import torch

    from llm_allreduce_plugin.measure.environment import write_record

    weight = torch.randn(OUT, HIDDEN, device="cuda", dtype=torch.bfloat16)
    arena = torch.empty((PLACES * STEP_BYTES + max(ROWS) * OUT * 2) // 2, device="cuda", dtype=torch.bfloat16)
    found = []
    for row in lines(weight, arena):
        found.append(row)
        print(summary(row), flush=True)
    if arguments.out:
        write_record(arguments.out, found, harness=__doc__, step_bytes=STEP_BYTES)


if __name__ == "__main__":
    main()
