"""How FP8 packets in band are spread over blocks and warps, at every size, each verified, then timed in a graph.

    python benchmarks/low_precision_shapes.py --gpus 2 --out benchmarks/h100/low_precision_shapes_tp2.json
    python benchmarks/low_precision_shapes.py --gpus 2 --wire-format fp8 fp8_group --forms one_shot

Formats of one run may be compared: at every size and in every form they come one after the other.

Forms: ``split``, two steps, lanes with one task each; ``two_shot`` and ``one_shot``, in which every lane does
everything. ``algorithms.measured.SPLITS`` and ``PACKET_FORMS`` come from these. Microseconds per call, bf16.
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
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.algorithms.packets import packets_of
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.measure.answers import MOST_ERROR, digest, make_case, relative_error
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from llm_allreduce_plugin.measure.timing import call_of, time_graph
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from llm_allreduce_plugin.transport.symmetric import SymmetricMemory
from llm_allreduce_plugin.wire import PACKETS

DTYPE = torch.bfloat16
WORKSPACE_BYTES = 384 << 20  # of each rank
# Parts of the lanes that only send, and that only take in.
SHARES = ((0.36, 0.0), (0.5, 0.0), (0.25, 0.0), (0.2, 0.25), (0.25, 0.25), (0.25, 0.33), (0.2, 0.33), (0.33, 0.33))
MOST_PACKETS_OF_A_WARP = 64  # more than that in turns is slow beyond doubt
SIZES = tuple(1 << power for power in (16, 18, 20, 21, 22, 24, 26))
WARPS = (1, 2, 3, 4, 6, 8, 9, 12, 16)
ALGORITHMS = {"split": Algorithm.TWO_SHOT, "two_shot": Algorithm.TWO_SHOT, "one_shot": Algorithm.ONE_SHOT}
# form, bytes, lanes, threads, lanes that only scatter, and that only drain, format
Shape = tuple[str, int, int, int, int, int, WireFormat]
FORMATS = [wire for wire in WireFormat if wire.goes_in_band]


def shapes_of(form: str, size: int, world_size: int, multiprocessors: int, wire: WireFormat) -> list[Shape]:
    """What is worth trying: a packet to a warp, and fewer warps than that where the message is large."""
    grids = (multiprocessors, 2 * multiprocessors)
    if form == "split":
        splits = itertools.product(grids, SHARES)
        return [(form, size, lanes, _C.MAX_THREADS, int(lanes * s), int(lanes * d), wire) for lanes, (s, d) in splits]
    parts = 1 if ALGORITHMS[form] is Algorithm.ONE_SHOT else world_size
    packets = packets_of(size // DTYPE.itemsize, wire, parts)
    shapes = []
    for warps in WARPS:
        enough = math.ceil(packets / warps)
        candidates = {lanes for lanes in (multiprocessors // 4, multiprocessors // 2, *grids) if lanes < enough}
        if enough <= grids[-1]:
            candidates.add(enough)
        shapes += [(form, size, lanes, 32 * warps, 0, 0, wire) for lanes in sorted(candidates)]
    return [shape for shape in shapes if packets / (shape[2] * shape[3] // 32) <= MOST_PACKETS_OF_A_WARP]


def chunk_of(form: str, size: int, layout: _C.Layout, wire: WireFormat) -> int:
    """Vectors of a round, of rounds of equal length."""
    one_step = ALGORITHMS[form] is Algorithm.ONE_SHOT
    packet = PACKETS[wire]
    packets = packets_of(size // DTYPE.itemsize, wire, 1 if one_step else layout.world_size)
    slot = layout.in_band.one_shot_bytes if one_step else layout.in_band.two_shot_bytes
    rounds = math.ceil(packets / (slot // packet.bytes))
    return math.ceil(packets / rounds) * packet.bytes // _C.VECTOR_BYTES


def measure(context: RankContext, shapes: list[Shape]) -> list[dict[str, Any]]:
    """Collective: one workspace, all shapes."""
    lanes_of_workspace = max(shape[2] for shape in shapes)
    layout = _C.make_layout(context.world_size, lanes_of_workspace, in_band_bytes=WORKSPACE_BYTES)
    memory = SymmetricMemory.open(Agreement(context.control_group, 300.0), context.group, context.device, layout)
    workspace = _C.Workspace(context.rank, memory.bases, layout, 10.0, context.device.index)
    rows = []
    for size, group in itertools.groupby(shapes, key=lambda shape: shape[1]):
        count = size // DTYPE.itemsize
        mine, exact = make_case(context, count, DTYPE)
        for form, _, lanes, threads, scatter, drain, wire in group:
            output = torch.full_like(mine, float("nan"))
            plan = _C.Plan(
                workspace,
                algorithm=ALGORITHMS[form],
                exchange=_C.PUSH,
                wire=PACKETS[wire].code,
                count=count,
                dtype=DTYPE_CODES[DTYPE],
                lanes=lanes,
                threads=threads,
                chunk_vectors=chunk_of(form, size, layout, wire),
                scatter_lanes=scatter,
                drain_lanes=drain,
            )
            timing = time_graph(context, call_of(plan, mine, output))
            error = relative_error(output, exact)
            wrong = int(error > MOST_ERROR[wire])
            wrong += int(len(set(context.gather(digest(output)))) > 1)
            row = {"wire_format": str(wire), "form": form, "bytes": size, "lanes": lanes, "threads": threads}
            row |= {"scatter_lanes": scatter, "drain_lanes": drain, "error": round(error, 5)}
            rows.append(row | {"us": round(timing.median, 2), "wrong": sum(context.gather(wrong))})
    torch.cuda.synchronize()
    memory.close()
    return rows


def shape_in_words(row: dict[str, Any]) -> str:
    tasks = f" {row['scatter_lanes']}/{row['drain_lanes']}" if row["scatter_lanes"] else ""
    return f"{row['lanes']}x{row['threads']}{tasks}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--forms", nargs="+", choices=tuple(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--wire-format", nargs="+", choices=FORMATS, default=[WireFormat.FP8])
    parser.add_argument("--bytes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    shapes = [
        shape
        for size in arguments.bytes
        for form in arguments.forms
        for wire in arguments.wire_format
        for shape in shapes_of(form, size, arguments.gpus, multiprocessors, WireFormat(wire))
    ]
    pool = RankPool(arguments.gpus, "cuda")
    try:
        rows = pool.run(measure, shapes, timeout_s=400)[0]
    finally:
        pool.close()
    for (size, form, wire), group in itertools.groupby(
        rows, key=lambda row: (row["bytes"], row["form"], row["wire_format"])
    ):
        best = sorted(group, key=lambda row: row["us"])
        text = "  ".join(f"{row['us']:>8} ({shape_in_words(row)})" for row in best[:4])
        print(f"{size:>10} {form:>8} {wire:>9}: {text}  worst {best[-1]['us']}")
    wrong = sum(row["wrong"] for row in rows)
    print(f"{len(rows)} shapes, {wrong} wrong")
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__, world_size=arguments.gpus)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
