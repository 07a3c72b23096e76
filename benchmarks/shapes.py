"""Launch shapes: every kernel at every size over blocks, threads and chunks, each verified, then timed in a graph.

    python benchmarks/shapes.py --gpus 4 --out benchmarks/h200/shapes_tp4.json
    python benchmarks/shapes.py --gpus 2 --only UB --min 22 --blocks 1    # results stored into registered outputs
    python benchmarks/shapes.py --gpus 2 --only UB PULLED_UB --min 20 --blocks 1    # the same, and inputs read in place

The thresholds and launch tables of the package come from these. Microseconds per call, bf16.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.measure.answers import make_case, wrong_elements
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from llm_allreduce_plugin.measure.timing import call_of, time_graph
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.peer import sending_fault
from llm_allreduce_plugin.transport.registered import ALIGNMENT, RegisteredPool
from llm_allreduce_plugin.transport.symmetric import SymmetricMemory

DTYPE = torch.bfloat16
# algorithm, bytes, lanes, threads, chunk vectors, lanes that only scatter, lanes that only drain
Shape = tuple[str, int, int, int, int, int, int]
SPLIT_FROM = 1 << 22  # bytes from which lanes with one task are tried
PLACED = ("UB", "PULLED_UB")  # outputs, and of the second inputs, lie in registered memory


def shapes_of(
    algorithm: str, parts: int, sizes: list[int], most_blocks: tuple[int, ...], multiprocessors: int, *, in_band: bool
) -> list[Shape]:
    """One vector to a thread where that is enough, then more."""
    shapes = []
    scatters, drains = {
        "ONESHOT": ((12, 14, 16, 18, 20, 24), (0,)),
        "TWOSHOT": ((32, 40, 48, 56), (24, 33, 40)),
        "UB": ((16, 24, 32, 40, 48, 56, 64, 72, 80, 88), (0,)),
        "PULLED_UB": ((), ()),  # nothing is scattered
    }[algorithm]
    most_threads = _C.MAX_THREADS if in_band else _C.MAX_FLAGGED_THREADS
    for size in sizes:
        pieces = math.ceil(size / 16 / parts)
        seen = set()
        for threads in sorted({64, 128, 256, most_threads}):
            for most in most_blocks:
                lanes = min(most, math.ceil(pieces / threads))
                # Several vectors per thread of a small block leave the GPU idle.
                if (lanes, threads) in seen or (lanes * threads < pieces and threads < 256):
                    continue
                seen.add((lanes, threads))
                shapes.append((algorithm, size, lanes, threads, pieces if in_band else math.ceil(pieces / lanes), 0, 0))
                if in_band and size >= SPLIT_FROM and threads == most_threads and lanes == multiprocessors:
                    shapes += [
                        (algorithm, size, lanes, threads, pieces, scatter, drain)
                        for scatter in scatters
                        for drain in drains
                    ]
    return shapes


class Registered:
    """Memory that peers see: for an output of at most ``size`` bytes, and an input, at the same place on every rank."""

    def __init__(self, agreement: Agreement, context: RankContext, transport: Transport, size: int) -> None:
        self.pool = RegisteredPool.open(
            agreement,
            context.group,
            context.device,
            transport,
            2 * size + ALIGNMENT,
            largest=size,
            by_files=sending_fault(agreement) is None,
        )
        inputs = self.pool.take((size // DTYPE.itemsize,), DTYPE)  # nothing else is taken
        assert inputs is not None
        self.inputs = inputs
        self.distances = [base - self.pool.bases[context.rank] for base in self.pool.bases]

    def output(self, count: int) -> torch.Tensor:
        """Of so many elements; another one lies there, too."""
        return self.pool.lend((count,), DTYPE, 0)


def measure(context: RankContext, shapes: list[Shape], workspace_bytes: int, lanes: int, in_band: bool) -> list[Any]:  # noqa: FBT001
    flagged = 0 if in_band else workspace_bytes
    layout = _C.make_layout(context.world_size, lanes, in_band_bytes=workspace_bytes - flagged, flagged_bytes=flagged)
    agreement = Agreement(context.control_group, 300.0)
    memory = SymmetricMemory.open(agreement, context.group, context.device, layout)
    placed = max([0, *(size for algorithm, size, *_ in shapes if algorithm in PLACED)])
    registered = Registered(agreement, context, memory.transport, placed) if placed else None
    workspace = _C.Workspace(context.rank, memory.bases, layout, 10.0, context.device.index)
    rows = []
    data: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for algorithm, size, used, threads, wanted, scatter, drain in shapes:
        kind = layout.in_band if in_band else layout.flagged
        capacity = kind.one_shot_bytes if algorithm == "ONESHOT" else kind.two_shot_bytes
        rounds = math.ceil(wanted / (capacity // 16))
        chunk = math.ceil(wanted / rounds)  # rounds of equal length, so that no rank has more to do in the last
        if chunk > threads:
            chunk = math.ceil(chunk / 8) * 8
        count = size // DTYPE.itemsize
        if count not in data:
            data.clear()
            data[count] = make_case(context, count, DTYPE)
        mine, expected = data[count]
        output = torch.empty_like(mine)
        if algorithm in PLACED and registered is not None:
            output = registered.output(count)
        if algorithm == "PULLED_UB" and registered is not None:
            mine = registered.inputs[:count].copy_(mine)
        output.fill_(float("nan"))
        torch.cuda.synchronize()
        context.gather(None)  # nobody stores into an output that is still being filled
        kernel = _C.ONE_SHOT if algorithm == "ONESHOT" else _C.TWO_SHOT
        plan = _C.Plan(
            workspace,
            algorithm=kernel,
            exchange=_C.PLACE if algorithm in PLACED else _C.PUSH if in_band else _C.FLAGS,
            pools=registered.pool.bases if algorithm in PLACED and registered is not None else (),
            peer_distances=registered.distances if algorithm == "PULLED_UB" and registered is not None else (),
            count=count,
            dtype=DTYPE_CODES[DTYPE],
            lanes=used,
            threads=threads,
            chunk_vectors=chunk,
            scatter_lanes=scatter,
            drain_lanes=drain,
        )
        call = call_of(plan, mine, output)
        call()
        torch.cuda.synchronize()
        wrong = wrong_elements(output, expected, exact=True, world_size=context.world_size)
        output.fill_(float("nan"))
        torch.cuda.synchronize()
        context.gather(None)
        timing = time_graph(context, call)
        wrong += wrong_elements(output, expected, exact=True, world_size=context.world_size)
        row = {"algorithm": algorithm, "bytes": size, "lanes": used, "threads": threads, "chunk_vectors": chunk}
        row |= {"scatter_lanes": scatter, "drain_lanes": drain}
        row |= {"us": round(timing.median, 2), "fastest_us": round(timing.fastest, 2)}
        rows.append(row | {"wrong": sum(context.gather(wrong))})
    torch.cuda.synchronize()
    memory.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--flagged", action="store_true", help="the kernels that wait for flags")
    parser.add_argument("--min", type=int, default=12, help="smallest size, as a power of two")
    parser.add_argument("--max", type=int, default=28, help="largest size, as a power of two")
    parser.add_argument("--step", type=int, default=2, help="powers of two between sizes")
    parser.add_argument(
        "--blocks", type=float, nargs="+", default=[0.25, 0.5, 1, 2], help="most blocks per multiprocessor"
    )
    parser.add_argument("--workspace-mib", type=int, default=384)
    parser.add_argument("--only", nargs="+", default=["ONESHOT", "TWOSHOT"], choices=["ONESHOT", "TWOSHOT", *PLACED])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    world_size = arguments.gpus
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    tried = tuple(int(multiprocessors * blocks) for blocks in arguments.blocks)
    sizes = [1 << power for power in range(arguments.min, arguments.max + 1, arguments.step)]
    largest_one_shot = 1 << 28 if world_size == 2 else 1 << 20
    in_band = not arguments.flagged
    small = [size for size in sizes if size <= largest_one_shot]
    large = [size for size in sizes if size >= 1 << 16]
    shapes = []
    for algorithm, parts, tried_sizes in (
        ("ONESHOT", 1, small),
        ("TWOSHOT", world_size, large),
        *((algorithm, world_size, large) for algorithm in PLACED),
    ):
        if algorithm in arguments.only:
            shapes += shapes_of(algorithm, parts, tried_sizes, tried, multiprocessors, in_band=in_band)
    pool = RankPool(world_size, "cuda")
    try:
        workspace = arguments.workspace_mib << 20
        rows = pool.run(measure, shapes, workspace, max(tried), in_band, timeout_s=500)[0]
    finally:
        pool.close()
    best: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        best.setdefault((row["algorithm"], row["bytes"]), []).append(row)
    print(f"{world_size} GPUs, {'flagged' if arguments.flagged else 'in band'}: lanes x threads, chunk in vectors")
    for (algorithm, size), group in best.items():
        group.sort(key=lambda row: row["us"])
        text = "  ".join(
            f"{r['us']:>8} ({r['lanes']}x{r['threads']} {r['scatter_lanes']}/{r['drain_lanes']})" for r in group[:3]
        )
        print(f"{algorithm} {size:>10}: {text}  worst {group[-1]['us']}")
    wrong = sum(row["wrong"] for row in rows)
    print(f"{len(rows)} shapes, {wrong} wrong elements")
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__, world_size=world_size)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
