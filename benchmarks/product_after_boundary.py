"""How long the matrix products around a layer's boundary take when sum and norm are one kernel, and when they are two.

    python benchmarks/product_after_boundary.py --gpus 2 --out benchmarks/h100/product_after_boundary_tp2.json
    python benchmarks/product_after_boundary.py --gpus 2 --rows 1 8 32 128 --grids --out benchmarks/h100/grids_tp2.json

On each rank, eight times in one CUDA graph: the product of a Llama's attention output, [rows, 8192 / ranks] x
[8192 / ranks, 8192], the boundary (all-reduce, residual, RMSNorm), the product of its gate and up projections,
[rows, 8192] x [8192, 57344 / ranks]. bf16. What a boundary returns lies where torch puts it. That changes from capture
to capture here, by a tensor of another size that is there before: ``before_kib``. ``fused``: in one kernel, as AUTO
decides without a profile. Microseconds of rank 0's kernels, by torch's profiler, the median of the eight: of the first
product, of the boundary's kernels together, and of the product behind it; ``round_us``: from one first product's start
to the next one's.

``--grids``: one kernel in one step, of grids with as many blocks as its rows need, and more, which have no row; the
times of each rank. What a grid leaves behind for the clusters of a product, clusters_leave.py says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import fused_shapes
from benchmarks.kernel_times import replays_in
from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import RankPool
from llm_allreduce_plugin.transport.symmetric import SymmetricMemory

HIDDEN, FFN = 8192, 57344
ROWS = (8, 32, 128)
BEFORE_KIB = (0, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 20480, 24576)
LARGEST_GRID = 132
LANES = (8, 16, 24, 32, 48, 64, 66, 72, 80, 88, 96, 104, 112, 120, 128, 132)
IN_A_ROW = 8
EPS = 1e-5


def is_product(kernel: dict[str, Any]) -> bool:
    """Whether cuBLAS's kernel of that name is a matrix product: what adds up its parts is not, but belongs to one."""
    return any(word in kernel["name"] for word in ("nvjet", "gemm", "cutlass"))


def of_replay(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """What is recorded of one replay.

    Args:
        kernels: name, ``ts`` and ``dur`` in microseconds, in the order of their start. Two products are of one round;
            what runs between the first and the second is the boundary, but for what adds up a product's parts.

    Raises:
        ValueError: there are not two products for each round.
    """
    products = [index for index, kernel in enumerate(kernels) if is_product(kernel)]
    if len(products) != 2 * IN_A_ROW:
        message = f"{len(products)} products in a replay of {IN_A_ROW} rounds: {sorted({k['name'] for k in kernels})}"
        raise ValueError(message)
    firsts, seconds = products[::2], products[1::2]
    boundaries = [
        sum(kernel["dur"] for kernel in kernels[first + 1 : second] if "splitK" not in kernel["name"])
        for first, second in zip(firsts, seconds, strict=True)
    ]
    starts = [kernels[index]["ts"] for index in firsts]
    rounds = [later - sooner for sooner, later in itertools.pairwise(starts)]
    return {
        "first_us": round(statistics.median(kernels[index]["dur"] for index in firsts), 2),
        "boundary_us": round(statistics.median(boundaries), 2),
        "behind_us": round(statistics.median(kernels[index]["dur"] for index in seconds), 2),
        "round_us": round(statistics.median(rounds), 2),
    }


def profiled(context: Any, graphs: list[Any]) -> list[dict[str, float]]:  # noqa: ANN401
    """What is recorded of each graph, on this rank: run twice, then all of them once under the profiler. Collective."""
    import torch
    import torch.distributed as dist

    for graph in graphs:
        graph.replay()
        graph.replay()
    torch.cuda.synchronize()
    dist.barrier(group=context.control_group)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        replays = replays_in(json.loads(path.read_text())["traceEvents"])
    dist.barrier(group=context.control_group)
    assert len(replays) == len(graphs)
    return [of_replay(kernels) for kernels in replays]


def captured(stream: Any, layers: Callable[[int], None], before_kib: int = 0) -> Any:  # noqa: ANN401
    """A graph of IN_A_ROW layers, captured on ``stream`` behind one that ran. Collective."""
    import torch

    with torch.cuda.stream(stream):
        layers(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        other = torch.empty(before_kib << 10, device=stream.device, dtype=torch.uint8)
        layers(IN_A_ROW)
        del other
    return graph


def products(context: Any) -> tuple[Any, Any, Callable[..., Any]]:  # noqa: ANN401
    """The weights of the products of a layer, transposed, and what makes random tensors, the same on every rank."""
    import torch

    torch.manual_seed(1)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=context.device, dtype=torch.bfloat16)

    return some(HIDDEN, HIDDEN // context.world_size).t(), (some(FFN // context.world_size, HIDDEN) / 100).t(), some


def measure(context: Any, rows_list: list[int]) -> list[dict[str, Any]]:  # noqa: ANN401
    """One kernel and two, with outputs at several places, on each rank."""
    import torch

    first, gate_up, some = products(context)
    weight = some(HIDDEN)
    groups = {fused: context.communicator("AUTO", fuse_norm=fused) for fused in (True, False)}
    found, graphs, held = [], [], []
    stream = torch.cuda.Stream(context.device)  # type: ignore[no-untyped-call]
    for rows in rows_list:
        attention, residual = some(rows, first.shape[0]), some(rows, HIDDEN)
        held.append((attention, residual))
        for before_kib, (fused, group) in itertools.product(BEFORE_KIB, groups.items()):

            def layers(count: int, group: Any = group, x: Any = attention, r: Any = residual) -> None:  # noqa: ANN401
                for _ in range(count):
                    normed = group.all_reduce_residual_rms_norm(torch.mm(x, first), r, weight, EPS)
                    torch.mm(normed.norm_out, gate_up)

            graphs.append(captured(stream, layers, before_kib))
            found.append({"rows": rows, "before_kib": before_kib, "fused": fused})
    times = profiled(context, graphs)
    for group in groups.values():
        group.close()
    return [row | mine for row, mine in zip(found, times, strict=True)]


def grids(rows: int) -> Iterator[fused_shapes.Shape]:
    """Of one kernel in one step, each as large as its rows need, or larger."""
    for cluster, threads in ((1, 512), (1, 1024), (2, 512), (4, 256), (8, 128)):
        least = min(rows * cluster, LARGEST_GRID // cluster * cluster)
        lanes = {least, *(lanes // cluster * cluster for lanes in LANES)}
        for number in sorted(lanes):
            if number >= least > 0:
                yield fused_shapes.Shape(_C.ONE_SHOT, number, threads, cluster)


def measure_grids(context: Any, rows_list: list[int]) -> list[dict[str, Any]]:  # noqa: ANN401
    """One kernel of several grids; ``ranks``: times of each rank."""
    import torch

    layout = _C.make_layout(context.world_size, 2 * LARGEST_GRID, in_band_bytes=512 << 20, flagged_bytes=0)
    memory = SymmetricMemory.open(Agreement(context.control_group, 300.0), context.group, context.device, layout)
    workspace = _C.Workspace(context.rank, memory.bases, layout, 10.0, context.device.index)
    _C.load_kernels(context.world_size)
    first, gate_up, some = products(context)
    found, graphs, held = [], [], []
    stream = torch.cuda.Stream(context.device)  # type: ignore[no-untyped-call]
    for rows in rows_list:
        case, attention = fused_shapes.Case(context, rows, HIDDEN, None), some(rows, first.shape[0])
        held.append((case, attention))
        for shape in grids(rows):
            plan = fused_shapes.plan_of(workspace, layout, case, shape, context.world_size)

            def layers(count: int, plan: Any = plan, case: Any = case, x: Any = attention) -> None:  # noqa: ANN401
                for _ in range(count):
                    torch.mm(x, first, out=case.mine)
                    residual_out = case.outputs.residual_out.data_ptr()
                    status = plan.normed(case.mine.data_ptr(), residual_out, fused_shapes.stream(), case.tensors)
                    assert status == 0
                    torch.mm(case.outputs.norm_out, gate_up)

            graphs.append(captured(stream, layers))
            found.append({"rows": rows, "cluster": shape.cluster, "threads": shape.threads, "lanes": shape.lanes})
    everyone = context.gather(profiled(context, graphs))
    memory.close()
    return [row | {"ranks": [times[index] for times in everyone]} for index, row in enumerate(found)]


def print_both(found: list[dict[str, Any]]) -> None:
    """One kernel beside two."""
    for rows, fused in itertools.product(dict.fromkeys(row["rows"] for row in found), (True, False)):
        mine = [row for row in found if (row["rows"], row["fused"]) == (rows, fused)]
        medians = {name: statistics.median(row[name] for row in mine) for name in mine[0] if name.endswith("_us")}
        behind = sorted(row["behind_us"] for row in mine)
        print(f"{rows:4d} rows, {'one kernel' if fused else 'two kernels'}: {medians}; behind: {behind}")


def print_grids(found: list[dict[str, Any]]) -> None:
    """A line to each grid."""
    for row in found:
        times = "; ".join(f"behind {rank['behind_us']}, round {rank['round_us']}" for rank in row["ranks"])
        print(
            f"{row['rows']:4d} rows, {row['lanes']} blocks of {row['threads']} in clusters of {row['cluster']}: {times}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--grids", action="store_true", help="one kernel, of several grids")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pool = RankPool(arguments.gpus, "cuda")
    try:
        found = pool.run(measure_grids if arguments.grids else measure, arguments.rows, timeout_s=300)[0]
    finally:
        pool.close()
    (print_grids if arguments.grids else print_both)(found)
    if arguments.out:
        write_record(arguments.out, found, harness=__doc__, world_size=arguments.gpus)


if __name__ == "__main__":
    main()
