"""What the proofs of `llm-allreduce check` take their time for.

    python benchmarks/check_parts.py --gpus 2 --out benchmarks/h200/check_parts_tp2.json
    python benchmarks/check_parts.py --gpus 0

As `check` does it: a process loads torch, ranks are forked from it, and each opens a communicator over peers' memory
and one over host memory and compares sums. A row to each rank; seconds. ``--gpus 0``: two CPU ranks, which have one way
to reach each other. `check` loads torch while it looks at the node, so that its whole is less than the sum.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BEGAN = time.perf_counter()
import torch  # noqa: E402

LOADED_S = time.perf_counter() - BEGAN

from llm_allreduce_plugin.config import TransportChoice  # noqa: E402
from llm_allreduce_plugin.diagnosis.proof import COUNTS, WAIT_S  # noqa: E402
from llm_allreduce_plugin.measure.answers import make_case, wrong_elements  # noqa: E402
from llm_allreduce_plugin.measure.environment import write_record  # noqa: E402
from llm_allreduce_plugin.measure.ranks import RankPool  # noqa: E402

if TYPE_CHECKING:
    from llm_allreduce_plugin.measure.ranks import RankContext


def prove(context: RankContext) -> dict[str, float]:
    """On a rank: seconds of each part."""
    parts: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        parts[name] = parts.get(name, 0.0) + time.perf_counter() - began

    for transport in ("peer", "host") if context.device.type == "cuda" else ("auto",):
        with timed(f"open, {transport}"):
            group = context.communicator("MINLATENCY", transport=TransportChoice(transport), timeout_s=WAIT_S)
        for count in COUNTS:
            with timed("what is summed"):
                mine, expected = make_case(context, count, torch.bfloat16)
            with timed("sums"):
                result = group.all_reduce(mine)
            with timed("comparing"):
                wrong = wrong_elements(result, expected, exact=True, world_size=context.world_size)
            assert wrong == 0, f"{wrong} of {count} sums are wrong"
        with timed("closing"):
            group.close()
    return {name: round(seconds, 3) for name, seconds in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with RankPool(arguments.gpus or 2, "cuda" if arguments.gpus else "cpu", forked=True, nccl_at_once=False) as pool:
        started_s = time.perf_counter() - began
        whole = {"loading torch": round(LOADED_S, 2), "ranks, with their contexts": round(started_s, 2)}
        rows = [{"rank": rank, **whole, **parts} for rank, parts in enumerate(pool.run(prove))]
    for row in rows:
        print(row)
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__)


if __name__ == "__main__":
    main()
