"""Launch shapes of fused calls (all-reduce, residual, RMSNorm, quantization), each verified, then timed in a graph.

    python benchmarks/fused_shapes.py --gpus 2 --hidden 8192 --out benchmarks/h100/fused_shapes_tp2.json

Beside them, for the same rows: the all-reduce and then our norm, and our norm alone. The launch tables of the package
come from these. Microseconds per call, bf16.

With ``--between 4096`` each call stands behind a matrix product of that inner dimension, as in a model: calls in a row
flatter kernels that start while the one before them ends. With ``--behind 28672`` a product of that many columns reads
what each call has normed: the launch of one kernel can make the next one slower. ``us`` is then what the call adds to
the products' own time.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin import _C, AllReduceConfig
from llm_allreduce_plugin.algorithms.base import Message
from llm_allreduce_plugin.algorithms.by_table import MinLatency
from llm_allreduce_plugin.algorithms.facts import PAIR, GroupFacts
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.measure.answers import make_case
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.products import MatrixProduct
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from llm_allreduce_plugin.measure.timing import time_graph
from llm_allreduce_plugin.norm import Normed, Quant, QuantKind, empty_outputs
from llm_allreduce_plugin.oracle.norm import residual_rms_norm
from llm_allreduce_plugin.runtime import calls
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.symmetric import SymmetricMemory

DTYPE = torch.bfloat16
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a call is spread."""

    algorithm: int
    lanes: int
    threads: int
    cluster: int = 1
    scatter_lanes: int = 0
    drain_lanes: int = 0


def threads_for(units: int) -> int:
    return max(32, math.ceil(units / 32) * 32)


def spread(algorithm: int, rows: int, units: int, most_threads: dict[int, int]) -> list[Shape]:
    """A row to a cluster, with a unit of it to a thread, or to a block.

    ``rows``: of a rank. ``most_threads``: of a block, by the units that each has.
    """
    shapes = []
    for cluster in (1, 2, 4, 8):
        for per_thread, most in most_threads.items():
            threads = threads_for(math.ceil(units / cluster / per_thread))
            if threads > most or (cluster > 1 and (per_thread > 1 or threads < 64)):
                continue
            for grid in (132, 264):
                shapes.append(Shape(algorithm, min(rows * cluster, grid // cluster * cluster), threads, cluster))
    return shapes


def shapes_of(rows: int, hidden: int, world_size: int, which: frozenset[str]) -> list[Shape]:
    """Lanes that do everything, unless ``"split"``, and lanes of one task. ``"wide"``: of those more, too."""
    wide, split = ("wide" in which, "split" in which)
    units = hidden // 8
    of_two = threads_for(math.ceil(units / 2))
    most = _C.MAX_WIDE_THREADS if world_size == PAIR else _C.MAX_THREADS
    shapes = [] if split else spread(_C.ONE_SHOT, rows, units, {1: most, 2: _C.MAX_THREADS})
    if rows * hidden * 2 >= 1 << 20:
        for lanes in (132, 264) if wide else (132,):
            shapes += [
                Shape(_C.ONE_SHOT, lanes, of_two, 1, scatter * lanes // 132) for scatter in (8, 12, 16, 24, 32, 40, 48)
            ]
    if world_size > 2:
        own = math.ceil(rows / world_size)
        shapes += [] if split else spread(_C.TWO_SHOT, own, units, {1: _C.MAX_THREADS, 2: _C.MAX_THREADS})
        if rows * hidden * 2 >= 4 << 20:
            tasks = ((48, 40), (33, 33), (33, 60), (24, 60), (24, 76), (16, 60), (16, 76), (16, 84))
            shapes += [Shape(_C.TWO_SHOT, 132, of_two, 1, scatter, drain) for scatter, drain in tasks]
    return list(dict.fromkeys(shapes))


class Case:
    """Rows of one size on this rank, and what they must become."""

    def __init__(self, context: RankContext, rows: int, hidden: int, quant: Quant | None) -> None:
        mine, sums = make_case(context, rows * hidden, DTYPE)
        self.mine, self.sums = mine.view(rows, hidden), sums.view(rows, hidden).to(context.device)
        generator = torch.Generator().manual_seed(rows)
        self.residual = torch.randn(rows, hidden, generator=generator).to(DTYPE).to(context.device)
        self.weight = torch.randn(hidden, generator=generator).to(DTYPE).to(context.device)
        self.quant = quant
        self.outputs = empty_outputs(self.mine, quant, return_norm=False)
        self.expected = residual_rms_norm(self.sums, self.residual, self.weight, EPS, quant=quant)
        self.norm = _C.Norm(hidden, EPS, quant=_C.QUANT_NONE if quant is None else quant.kind.code)
        out = self.outputs
        self.tensors = _C.NormTensors(
            residual=self.residual.data_ptr(),
            weight=self.weight.data_ptr(),
            norm_out=0 if out.norm_out is None else out.norm_out.data_ptr(),
            quant_out=0 if out.quant_out is None else out.quant_out.data_ptr(),
            scale_out=0 if out.scale_out is None else out.scale_out.data_ptr(),
            scale=0 if quant is None or quant.scale is None else quant.scale.data_ptr(),
        )

    def poison(self) -> None:
        """Fill the outputs."""
        for output in self.outputs:
            if output is not None:
                output.view(torch.uint8).fill_(0xA5)

    def wrong(self) -> int:
        """Bytes of the outputs that are not as they must be."""

        def bits(normed: Normed) -> list[torch.Tensor]:
            return [t.contiguous().view(torch.uint8) for t in normed if t is not None]

        return sum(int((a != b).sum()) for a, b in zip(bits(self.outputs), bits(self.expected), strict=True))


def plan_of(workspace: _C.Workspace, layout: _C.Layout, case: Case, shape: Shape, world_size: int) -> _C.Plan:
    rows, hidden = case.mine.shape
    one_shot = shape.algorithm == _C.ONE_SHOT
    slot = layout.in_band.one_shot_bytes if one_shot else layout.in_band.two_shot_bytes
    units = hidden // 8
    chunk = min(rows if one_shot else math.ceil(rows / world_size), slot // 16 // units) * units
    return _C.Plan(
        workspace, algorithm=shape.algorithm, exchange=_C.PUSH, count=case.mine.numel(), dtype=DTYPE_CODES[DTYPE],
        lanes=shape.lanes, threads=shape.threads, chunk_vectors=chunk, scatter_lanes=shape.scatter_lanes,
        drain_lanes=shape.drain_lanes, epilogue=_C.RMS_NORM, cluster=shape.cluster, norm=case.norm,
    )  # fmt: skip


def two_kernels(
    workspace: _C.Workspace, layout: _C.Layout, case: Case, norm: Callable[[], None], world_size: int
) -> Callable[[], None]:
    """The fastest exact sum, as the policy launches it, and ``norm`` behind it."""
    multiprocessors = torch.cuda.get_device_properties(case.mine.device).multi_processor_count
    facts = GroupFacts(world_size, "cuda", Transport.SYMMETRIC, architecture=90, multiprocessors=multiprocessors)
    message = Message(count=case.mine.numel(), dtype="bfloat16", element_bytes=2)
    launch = MinLatency().plan(AllReduceConfig(), facts.with_layout(Transport.SYMMETRIC, layout), message)
    plan = calls.plan_of(workspace, launch, case.mine.numel(), DTYPE)

    def both() -> None:
        assert plan(case.mine.data_ptr(), case.sums.data_ptr(), stream()) == 0
        norm()

    return both


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


class Products:
    """Matrix products around each call.

    One before it of inner dimension ``inner``, and one behind it of ``outer`` columns that reads what the call has
    normed. 0: there is none.
    """

    def __init__(self, context: RankContext, case: Case, inner: int, outer: int) -> None:
        self._context = context
        self._before: MatrixProduct | None = None
        self._behind: tuple[torch.Tensor, ...] | None = None
        rows, hidden = case.mine.shape

        def some(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=context.device, dtype=DTYPE)

        if inner:
            self._before = MatrixProduct(context, rows, inner, hidden, DTYPE)
        if outer and case.outputs.norm_out is not None:
            self._behind = case.outputs.norm_out, some(outer, hidden).t(), some(rows, outer)  # as in a linear layer
        self.us = time_graph(context, lambda: self._around(lambda: None)).median if inner or outer else 0.0

    def _around(self, call: Callable[[], None]) -> None:
        if self._before is not None:
            self._before.run()
        call()
        if self._behind is not None:
            normed, weights, product = self._behind
            torch.mm(normed, weights, out=product)

    def time(self, call: Callable[[], None]) -> dict[str, float]:
        """Microseconds that ``call`` adds to the products."""
        timing = time_graph(self._context, lambda: self._around(call))
        return {"us": round(timing.median - self.us, 2), "fastest_us": round(timing.fastest - self.us, 2)}


def measure(
    context: RankContext,
    hidden: int,
    rows_list: list[int],
    kinds: list[str],
    workspace_bytes: int,
    which: frozenset[str],
    inner: int,
    outer: int,
) -> list[dict[str, Any]]:
    layout = _C.make_layout(context.world_size, 264, in_band_bytes=workspace_bytes, flagged_bytes=0)
    memory = SymmetricMemory.open(Agreement(context.control_group, 300.0), context.group, context.device, layout)
    workspace = _C.Workspace(context.rank, memory.bases, layout, 10.0, context.device.index)
    _C.load_kernels(context.world_size)
    results: list[dict[str, Any]] = []
    for rows in rows_list:
        for kind in kinds:
            scale = torch.tensor([0.02], device=context.device)
            quant = None
            if kind != "none":
                quant = Quant(QuantKind(kind), scale if QuantKind(kind).needs_scale else None)
            case = Case(context, rows, hidden, quant)
            products = Products(context, case, inner, outer)
            row = {"hidden": hidden, "rows": rows, "bytes": rows * hidden * 2, "quant": kind}
            if inner or outer:
                row |= {"between": inner, "behind": outer, "product_us": round(products.us, 2)}

            def alone(case: Case = case) -> None:
                _C.rms_norm(
                    case.norm, case.tensors, case.sums.data_ptr(), case.outputs.residual_out.data_ptr(),
                    case.mine.numel(), DTYPE_CODES[DTYPE], context.device.index, stream(),
                )  # fmt: skip

            case.poison()
            alone()
            torch.cuda.synchronize()
            wrong = case.wrong()
            results.append(row | {"what": "norm alone"} | products.time(alone) | {"wrong": wrong})
            results.append(
                row
                | {"what": "sum, then norm"}
                | products.time(two_kernels(workspace, layout, case, alone, context.world_size))
            )
            for shape in shapes_of(rows, hidden, context.world_size, which):
                plan = plan_of(workspace, layout, case, shape, context.world_size)

                def fused(plan: _C.Plan = plan, case: Case = case) -> None:
                    status = plan.normed(
                        case.mine.data_ptr(), case.outputs.residual_out.data_ptr(), stream(), case.tensors
                    )
                    assert status == 0

                case.poison()
                fused()
                torch.cuda.synchronize()
                wrong = case.wrong()
                found = row | {"what": "fused"} | dataclasses.asdict(shape) | products.time(fused)
                results.append(found | {"wrong": sum(context.gather(wrong))})
    torch.cuda.synchronize()
    memory.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--hidden", type=int, nargs="+", default=[8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 128, 256, 1024, 4096])
    parser.add_argument("--quant", nargs="+", default=["none"], choices=["none", *QuantKind])
    parser.add_argument("--wide", action="store_true", help="two blocks to a multiprocessor, too")
    parser.add_argument("--split", action="store_true", help="only lanes with one task each")
    parser.add_argument(
        "--between", type=int, default=0, metavar="K", help="a matrix product of inner dimension K before each call"
    )
    parser.add_argument("--behind", type=int, default=0, metavar="N", help="one of N columns behind each call")
    parser.add_argument("--workspace-mib", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    which = frozenset(name for name in ("wide", "split") if getattr(arguments, name))
    pool = RankPool(arguments.gpus, "cuda")
    results = []
    try:
        for hidden in arguments.hidden:
            results += pool.run(
                measure, hidden, arguments.rows, arguments.quant, arguments.workspace_mib << 20, which,
                arguments.between, arguments.behind, timeout_s=500,
            )[0]  # fmt: skip
    finally:
        pool.close()
    write_record(arguments.out, results, world_size=arguments.gpus)
    for hidden in arguments.hidden:
        for rows in arguments.rows:
            for kind in arguments.quant:
                mine = [r for r in results if (r["hidden"], r["rows"], r["quant"]) == (hidden, rows, kind)]
                fused = sorted((r for r in mine if r["what"] == "fused"), key=lambda r: r["us"])
                best = ", ".join(
                    f"{r['us']} ({'2' if r['algorithm'] else '1'}: {r['lanes']}x{r['threads']} c{r['cluster']} "
                    f"s{r['scatter_lanes']})"
                    for r in fused[:4]
                )
                alone, two = (next(r["us"] for r in mine if r["what"] == w) for w in ("norm alone", "sum, then norm"))
                wrong = sum(r.get("wrong", 0) for r in mine)
                print(f"{hidden} x {rows} {kind}: norm {alone}, sum and norm {two}; {best}; wrong {wrong}")


if __name__ == "__main__":
    main()
