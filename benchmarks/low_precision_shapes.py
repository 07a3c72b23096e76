"""How the lanes of LOWPRECISION in band (FP8) share the tasks out, at every size, each verified, then timed in a graph.

    python benchmarks/low_precision_shapes.py --gpus 4 --out benchmarks/h200/low_precision_shapes_tp4.json

``algorithms.measured.SPLITS`` comes from these. Microseconds per call, bf16.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.group.layouts import DEFAULT_GPU_WORKSPACE_BYTES
from llm_allreduce_plugin.measure.answers import MOST_ERROR, make_case, relative_error
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from llm_allreduce_plugin.measure.timing import call_of, time_graph
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from llm_allreduce_plugin.transport.symmetric import SymmetricMemory
from llm_allreduce_plugin.wire import PACKETS

DTYPE = torch.bfloat16
PACKET = PACKETS[WireFormat.FP8]
# Parts of the lanes that only send, and that only take in.
SHARES = ((0.36, 0.0), (0.5, 0.0), (0.25, 0.0), (0.2, 0.25), (0.25, 0.25), (0.25, 0.33), (0.2, 0.33), (0.33, 0.33))
# bytes, lanes, of which scatter, of which drain
Shape = tuple[int, int, int, int]


def measure(context: RankContext, shapes: list[Shape]) -> list[dict[str, Any]]:
    """Collective: one workspace, all shapes."""
    lanes_of_workspace = max(lanes for _, lanes, _, _ in shapes)
    layout = _C.make_layout(context.world_size, lanes_of_workspace, in_band_bytes=DEFAULT_GPU_WORKSPACE_BYTES)
    memory = SymmetricMemory.open(Agreement(context.control_group, 300.0), context.group, context.device, layout)
    workspace = _C.Workspace(context.rank, memory.bases, layout, 10.0, context.device.index)
    rows = []
    for size, group in itertools.groupby(shapes, key=lambda shape: shape[0]):
        count = size // DTYPE.itemsize
        packets = math.ceil(count / PACKET.values / context.world_size)
        rounds = math.ceil(packets / (layout.in_band.two_shot_bytes // PACKET.bytes))
        chunk_vectors = math.ceil(packets / rounds) * PACKET.bytes // 16
        mine, exact = make_case(context, count, DTYPE)
        for _, lanes, scatter, drain in group:
            output = torch.full_like(mine, float("nan"))
            plan = _C.Plan(
                workspace,
                algorithm=_C.TWO_SHOT,
                exchange=_C.PUSH,
                wire=PACKET.code,
                count=count,
                dtype=DTYPE_CODES[DTYPE],
                lanes=lanes,
                threads=_C.MAX_THREADS,
                chunk_vectors=chunk_vectors,
                scatter_lanes=scatter,
                drain_lanes=drain,
            )
            timing = time_graph(context, call_of(plan, mine, output))
            wrong = int(relative_error(output, exact) > MOST_ERROR[WireFormat.FP8])
            row = {"bytes": size, "lanes": lanes, "scatter_lanes": scatter, "drain_lanes": drain}
            rows.append(row | {"us": round(timing.median, 2), "wrong": sum(context.gather(wrong))})
    torch.cuda.synchronize()
    memory.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    shapes = [
        (1 << power, lanes, int(lanes * scatter), int(lanes * drain))
        for power in range(18, 29, 2)
        for lanes in (multiprocessors, 2 * multiprocessors)
        for scatter, drain in SHARES
    ]
    pool = RankPool(arguments.gpus, "cuda")
    try:
        rows = pool.run(measure, shapes, timeout_s=400)[0]
    finally:
        pool.close()
    for size, group in itertools.groupby(rows, key=lambda row: row["bytes"]):
        best = sorted(group, key=lambda row: row["us"])
        text = "  ".join(f"{r['us']:>8} ({r['lanes']} {r['scatter_lanes']}/{r['drain_lanes']})" for r in best[:4])
        print(f"{size:>10}: {text}  worst {best[-1]['us']}")
    wrong = sum(row["wrong"] for row in rows)
    print(f"{len(rows)} shapes, {wrong} wrong")
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__, world_size=arguments.gpus)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
