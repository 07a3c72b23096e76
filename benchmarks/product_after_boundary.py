"""How long the matrix products around a layer's boundary take when sum and norm are one kernel, and when they are two.

    python benchmarks/product_after_boundary.py --gpus 2 --out benchmarks/h100/product_after_boundary_tp2.json

On each rank, eight times in one CUDA graph: the product of a Llama's attention output, [rows, 8192 / ranks] x
[8192 / ranks, 8192], the boundary (all-reduce, residual, RMSNorm), the product of its gate and up projections,
[rows, 8192] x [8192, 57344 / ranks]. bf16. What a boundary returns lies where torch puts it. That changes from capture
to capture here, by a tensor of another size that is there before: ``before_kib``. ``fused``: in one kernel, as AUTO
decides without a profile. Microseconds of rank 0's kernels, by torch's profiler, the median of the eight: of the first
product, of the boundary's kernels together, and of the product behind it; ``round_us``: from one first product's start
to the next one's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

HIDDEN, FFN = 8192, 57344
ROWS = (8, 32, 128)
BEFORE_KIB = (0, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 20480, 24576)
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


def replays_in(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The kernels of each graph that a trace of torch's profiler holds, in the order of the graphs."""
    launches = [event for event in events if event.get("name") == "cudaGraphLaunch"]
    kernels: dict[int, list[dict[str, Any]]] = {event["args"]["correlation"]: [] for event in launches}
    for event in events:
        if event.get("cat") == "kernel" and event["args"]["correlation"] in kernels:
            kernels[event["args"]["correlation"]].append(event)
    ordered = sorted(launches, key=lambda event: event["ts"])
    return [sorted(kernels[event["args"]["correlation"]], key=lambda kernel: kernel["ts"]) for event in ordered]


def measure(context: Any, rows_list: list[int]) -> list[dict[str, Any]]:  # noqa: ANN401
    """On each rank. Every graph runs twice before all of them run once under the profiler."""
    import json
    import tempfile

    import torch
    import torch.distributed as dist

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=context.device, dtype=torch.bfloat16)

    torch.manual_seed(1)  # a residual is the same on every rank
    inner, columns = HIDDEN // context.world_size, FFN // context.world_size
    first, gate_up, weight = some(HIDDEN, inner), some(columns, HIDDEN) / 100, some(HIDDEN)
    groups = {fused: context.communicator("AUTO", fuse_norm=fused) for fused in (True, False)}
    graphs: list[tuple[dict[str, Any], torch.cuda.CUDAGraph]] = []
    held = []
    stream = torch.cuda.Stream(context.device)  # type: ignore[no-untyped-call]
    for rows in rows_list:
        attention, residual = some(rows, inner), some(rows, HIDDEN)
        held.append((attention, residual))
        for before_kib in BEFORE_KIB:
            for fused, group in groups.items():

                def layers(count: int, group: Any = group, x: Any = attention, r: Any = residual) -> None:  # noqa: ANN401
                    for _ in range(count):
                        partial = torch.mm(x, first.t())
                        normed = group.all_reduce_residual_rms_norm(partial, r, weight, EPS)
                        torch.mm(normed.norm_out, gate_up.t())

                with torch.cuda.stream(stream):
                    layers(1)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    other = torch.empty(before_kib << 10, device=context.device, dtype=torch.uint8)
                    layers(IN_A_ROW)
                    del other
                graphs.append(({"rows": rows, "before_kib": before_kib, "fused": fused}, graph))
    for _, graph in graphs:
        graph.replay()
        graph.replay()
    torch.cuda.synchronize()
    dist.barrier(group=context.control_group)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _, graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        replays = replays_in(json.loads(path.read_text())["traceEvents"])
    dist.barrier(group=context.control_group)
    for group in groups.values():
        group.close()
    return [row | of_replay(kernels) for (row, _), kernels in zip(graphs, replays, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    from llm_allreduce_plugin.measure.environment import write_record
    from llm_allreduce_plugin.measure.ranks import RankPool

    pool = RankPool(arguments.gpus, "cuda")
    try:
        found = pool.run(measure, arguments.rows, timeout_s=300)[0]
    finally:
        pool.close()
    for rows in arguments.rows:
        for fused in (True, False):
            mine = [row for row in found if (row["rows"], row["fused"]) == (rows, fused)]
            medians = {name: statistics.median(row[name] for row in mine) for name in mine[0] if name.endswith("_us")}
            behind = sorted(row["behind_us"] for row in mine)
            print(f"{rows:4d} rows, {'one kernel' if fused else 'two kernels'}: {medians}; behind: {behind}")
    if arguments.out:
        write_record(arguments.out, found, harness=__doc__, world_size=arguments.gpus)


if __name__ == "__main__":
    main()
