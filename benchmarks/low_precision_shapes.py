"""How packets are spread over blocks and warps, at every size, each verified, then timed in a graph.

    python benchmarks/low_precision_shapes.py --gpus 2 --out benchmarks/h100/low_precision_shapes_tp2.json
    python benchmarks/low_precision_shapes.py --gpus 2 --wire-format fp8 fp8_group --forms one_shot
    python benchmarks/low_precision_shapes.py --gpus 4 --wire-format tq3 hadamard2 --forms flags

Formats of one run may be compared: at every size and in every form they come one after the other.

Forms: ``split``, two steps, lanes with one task each; ``two_shot`` and ``one_shot``, in which every lane does
everything; all of FP8, in band. ``flags``, for any format: two steps by flags. ``algorithms.measured.SPLITS`` and
``PACKET_FORMS`` come from these. Microseconds per call, bf16.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

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
WORKSPACE_BYTES = 384 << 20  # of each rank, and as much for flags
# Parts of the lanes that only send, and that only take in.
SHARES = ((0.36, 0.0), (0.5, 0.0), (0.25, 0.0), (0.2, 0.25), (0.25, 0.25), (0.25, 0.33), (0.2, 0.33), (0.33, 0.33))
MOST_PACKETS_OF_A_WARP = 64  # more than that in turns is slow beyond doubt
SIZES = tuple(1 << power for power in (16, 18, 20, 21, 22, 24, 26))
WARPS = (1, 2, 3, 4, 6, 8, 9, 12, 16)
FLAGGED_WARPS = (2, 3, 4, 6, 8)
FLAGS = "flags"
ALGORITHMS = {
    "split": Algorithm.TWO_SHOT,
    "two_shot": Algorithm.TWO_SHOT,
    "one_shot": Algorithm.ONE_SHOT,
    FLAGS: Algorithm.TWO_SHOT,
}


class Shape(NamedTuple):
    """One launch of a message."""

    form: str
    bytes: int
    lanes: int
    threads: int
    scatter: int  # lanes that only send
    drain: int  # lanes that only take in
    wire: WireFormat
    chunk: int = 0  # with flags: packets of a lane in a round


def shapes_of(form: str, size: int, world_size: int, multiprocessors: int, wire: WireFormat) -> list[Shape]:
    """What is worth trying: a packet to a warp, and fewer warps than that where the message is large."""
    grids = (multiprocessors, 2 * multiprocessors)
    if form == "split":
        splits = itertools.product(grids, SHARES)
        return [
            Shape(form, size, lanes, _C.MAX_THREADS, int(lanes * s), int(lanes * d), wire) for lanes, (s, d) in splits
        ]
    parts = 1 if ALGORITHMS[form] is Algorithm.ONE_SHOT else world_size
    packets = packets_of(size // DTYPE.itemsize, wire, parts)
    if form == FLAGS:
        return flagged_shapes(size, packets, multiprocessors, wire)
    shapes = []
    for warps in WARPS:
        enough = math.ceil(packets / warps)
        candidates = {lanes for lanes in (multiprocessors // 4, multiprocessors // 2, *grids) if lanes < enough}
        if enough <= grids[-1]:
            candidates.add(enough)
        shapes += [Shape(form, size, lanes, 32 * warps, 0, 0, wire) for lanes in sorted(candidates)]
    return [shape for shape in shapes if packets / (shape.lanes * shape.threads // 32) <= MOST_PACKETS_OF_A_WARP]


def flagged_shapes(size: int, packets: int, multiprocessors: int, wire: WireFormat) -> list[Shape]:
    """Few packets in many lanes, or many in few; where a lane has many, in several rounds, too."""
    grids = {multiprocessors // 2, multiprocessors, 3 * multiprocessors // 2, 2 * multiprocessors}
    chunks = {math.ceil(packets / lanes) for lanes in grids}
    chunks |= {chunk for chunk in (1, 2, 3, 4, 6, 8) if math.ceil(packets / chunk) <= 2 * multiprocessors}
    chunks |= {math.ceil(chunk / rounds) for chunk in chunks for rounds in (2, 4) if chunk >= 4 * rounds}
    return [
        Shape(FLAGS, size, min(2 * multiprocessors, math.ceil(packets / chunk)), 32 * warps, 0, 0, wire, chunk)
        for chunk in sorted(chunks)
        for warps in FLAGGED_WARPS
        if chunk >= warps // 4
    ]


def chunk_of(shape: Shape, layout: _C.Layout) -> int:
    """Vectors of a round: in band of all lanes, in rounds of equal length; with flags of one lane, at most its slot."""
    one_step = ALGORITHMS[shape.form] is Algorithm.ONE_SHOT
    packet = PACKETS[shape.wire]
    if shape.chunk:
        return min(shape.chunk, layout.flagged.two_shot_bytes // packet.bytes) * packet.bytes // _C.VECTOR_BYTES
    packets = packets_of(shape.bytes // DTYPE.itemsize, shape.wire, 1 if one_step else layout.world_size)
    slot = layout.in_band.one_shot_bytes if one_step else layout.in_band.two_shot_bytes
    rounds = math.ceil(packets / (slot // packet.bytes))
    return math.ceil(packets / rounds) * packet.bytes // _C.VECTOR_BYTES


def measure(context: RankContext, shapes: list[Shape]) -> list[dict[str, Any]]:
    """Collective: one workspace, all shapes."""
    lanes_of_workspace = max(shape.lanes for shape in shapes)
    layout = _C.make_layout(
        context.world_size, lanes_of_workspace, in_band_bytes=WORKSPACE_BYTES, flagged_bytes=WORKSPACE_BYTES
    )
    memory = SymmetricMemory.open(Agreement(context.control_group, 300.0), context.group, context.device, layout)
    workspace = _C.Workspace(context.rank, memory.bases, layout, 10.0, context.device.index)
    rows = []
    for size, group in itertools.groupby(shapes, key=lambda shape: shape.bytes):
        count = size // DTYPE.itemsize
        mine, exact = make_case(context, count, DTYPE)
        for shape in group:
            output = torch.full_like(mine, float("nan"))
            plan = _C.Plan(
                workspace,
                algorithm=ALGORITHMS[shape.form],
                exchange=_C.FLAGS if shape.form == FLAGS else _C.PUSH,
                wire=PACKETS[shape.wire].code,
                count=count,
                dtype=DTYPE_CODES[DTYPE],
                lanes=shape.lanes,
                threads=shape.threads,
                chunk_vectors=chunk_of(shape, layout),
                scatter_lanes=shape.scatter,
                drain_lanes=shape.drain,
            )
            timing = time_graph(context, call_of(plan, mine, output))
            error = relative_error(output, exact)
            wrong = int(error > MOST_ERROR[shape.wire])
            wrong += int(len(set(context.gather(digest(output)))) > 1)
            row = {"wire_format": str(shape.wire), "form": shape.form, "bytes": size, "lanes": shape.lanes}
            row |= {"threads": shape.threads, "scatter_lanes": shape.scatter, "drain_lanes": shape.drain}
            row |= {"chunk": shape.chunk, "error": round(error, 5)}
            rows.append(row | {"us": round(timing.median, 2), "wrong": sum(context.gather(wrong))})
    torch.cuda.synchronize()
    memory.close()
    return rows


def shape_in_words(row: dict[str, Any]) -> str:
    tasks = f" {row['scatter_lanes']}/{row['drain_lanes']}" if row["scatter_lanes"] else ""
    chunk = f" by {row['chunk']}" if row["chunk"] else ""
    return f"{row['lanes']}x{row['threads']}{tasks}{chunk}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--forms", nargs="+", choices=tuple(ALGORITHMS), default=["split", "two_shot", "one_shot"])
    parser.add_argument("--wire-format", nargs="+", choices=list(WireFormat), default=[WireFormat.FP8])
    parser.add_argument("--bytes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.forms != [FLAGS] and not all(WireFormat(wire).goes_in_band for wire in arguments.wire_format):
        parser.error(
            f"in band go {[str(wire) for wire in WireFormat if wire.goes_in_band]}; others have --forms {FLAGS}"
        )
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
