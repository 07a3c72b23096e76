"""Behind which grids the clusters of the next kernel begin at another GPC.

    python benchmarks/clusters_leave.py --out benchmarks/h100/clusters_leave.json

One GPU. A kernel puts it into a state, a kernel of a grid runs behind it, and behind that one a kernel of clusters of
two blocks, one block to a multiprocessor, which says on which multiprocessors its blocks run. The last one's clusters
go to the GPCs that have most multiprocessors free, and among those in turns. ``started_at`` and ``begins_at``: where
the turn begins without the grid in the middle, and with it. That is half of the first multiprocessor's number behind
those of the largest GPCs: multiprocessors 2k and 2k + 1 share a TPC, and the first TPCs are one of each GPC.
``cluster``: blocks of a cluster; 1: launched as a cluster of one block; 0: launched without clusters. A line for each
state and cluster; ``begins_at`` has a number for each number of clusters from 1 on, to two blocks of 256 threads for
each multiprocessor.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.product_behind import Runs, Shape, compiled

# Blocks, as clusters of one, that leave a state each.
STATES = (132, 5, 6, 7, 8, 104, 112, 120)
PLAIN = 0
CLUSTERS = (PLAIN, 1, 2, 4, 8)
THREADS = 256
BLOCKS = 2  # to a multiprocessor, at most


def of_cluster(blocks: int, cluster: int) -> Shape:
    """``cluster``: PLAIN for none."""
    return Shape(blocks, THREADS, early=False, lets_in=False, cluster=cluster)


def first_gpc(places: list[int]) -> int:
    """Where the turn begins, of the multiprocessors of a kernel's blocks in the order of the blocks.

    Those of the largest GPCs come first: they have the highest numbers.
    """
    first = next(place for place, before in zip(places[2::2], places[::2], strict=False) if place < before // 2)
    return first // 2


def lines(runs: Runs, multiprocessors: int) -> list[dict[str, Any]]:
    """All of the record."""

    def begins_at(*shapes: Shape) -> int:
        return first_gpc(runs.orders[runs.order_behind(*shapes)])

    found = []
    for state in STATES:
        before = of_cluster(state, 1)
        started_at = begins_at(before)
        for cluster in CLUSTERS:
            blocks = max(cluster, 1)
            most = BLOCKS * multiprocessors // blocks
            numbers = [begins_at(before, of_cluster(n * blocks, cluster)) for n in range(1, most + 1)]
            found.append({"state": state, "started_at": started_at, "cluster": cluster, "begins_at": numbers})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    import torch

    from llm_allreduce_plugin.measure.environment import write_record

    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(compiled(Path(folder)), None, 8, [])
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        found = lines(runs, multiprocessors)
    for row in found:
        kept = [n for n, at in enumerate(row["begins_at"], 1) if at == row["started_at"]]
        print(f"begins at {row['started_at']}, clusters of {row['cluster']}: as it was behind {kept}")
    if arguments.out:
        write_record(arguments.out, found, harness=__doc__, multiprocessors=multiprocessors)


if __name__ == "__main__":
    main()
