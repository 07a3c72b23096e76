"""How long a matrix product takes behind kernels of different grids, and which state they leave a GPU in.

    python benchmarks/product_behind.py --out benchmarks/h100/product_behind.json

Compiles benchmarks/product_behind.cu with nvcc (sm_90 and newer). The product is that of a Llama's gate and up
projections, [m, 8192] x [8192, 28672] in bf16, by cuBLAS. A kernel before it copies the product's input and takes 4 us.
Its shape: blocks, threads, blocks of a cluster, and whether it may start while the kernel before it drains (``early``)
and lets the next one start as soon as it starts itself (``lets_in``).

``part: behind``: that kernel alone, 12 in a row in a CUDA graph, then with the product behind each; ``product_us`` is
the difference. Shapes come in an order that matters: what one leaves behind, the next ones find.

``part: left``: 8 rows; graphs of 12 such kernels in a row, and after them the product alone, 12 in a row. First the
product is made fast or slow (``was_us``) by the shape that was seen to do that, then a shape runs (``product_us``).

``places``: a number for each order in which multiprocessors were given to blocks of a kernel of clusters of two blocks,
one block to a multiprocessor, launched then; the orders stand in the record by that number.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SOURCE = Path(__file__).with_suffix(".cu")
HIDDEN, OUT = 8192, 28672
ROWS = (1, 8, 32, 128)
LEAST_NS = 4000
IN_A_ROW = 12
REPLAYS = 5


class Shape(NamedTuple):
    """Of the kernel before the product."""

    blocks: int
    threads: int
    early: bool
    lets_in: bool
    cluster: int = 1


# What was seen to make the product of 8 rows slow, and fast again (H100).
MAKES_SLOW = Shape(128, 256, early=True, lets_in=True)
MAKES_FAST = Shape(66, 1024, early=True, lets_in=True)


def shapes(rows: int) -> Iterator[Shape]:
    """In the order in which they are measured."""
    grids = ((rows, 512), (rows, 1024), (132, 1024), (128, 256), (1, 1024), (66, 1024), (264, 512))
    for blocks, threads in dict.fromkeys(grids):
        for early, lets_in in ((False, False), (True, False), (True, True), (False, True)):
            yield Shape(blocks, threads, early, lets_in)


def left_shapes() -> Iterator[Shape]:
    """What runs after the product was made fast or slow."""
    grids = itertools.product((8, 32, 64, 66, 96, 128, 132, 160, 264), (128, 256, 512, 1024))
    for blocks, threads in grids:
        yield Shape(blocks, threads, early=True, lets_in=True)
    for blocks, cluster in itertools.product((8, 32, 64, 128, 256), (2, 4, 8)):
        yield Shape(blocks, 256, early=True, lets_in=True, cluster=cluster)
    for blocks, threads in ((128, 256), (66, 1024), (132, 1024), (264, 1024)):
        yield Shape(blocks, threads, early=False, lets_in=False)


def compiled(folder: Path) -> ctypes.CDLL:
    """The kernels, for the first GPU."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    library = folder / "product_behind.so"
    command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)  # noqa: S603
    kernels = ctypes.CDLL(str(library))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    kernels.launch_before.argtypes = [pointer, pointer, ctypes.c_uint32, ctypes.c_uint32, *[integer] * 5, pointer]
    kernels.launch_where.argtypes = [pointer, integer, pointer]
    return kernels


def microseconds(body: Callable[[Any], None]) -> float:
    """Of one of IN_A_ROW runs of ``body(stream)`` in a CUDA graph, the median of REPLAYS."""
    import torch

    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        body(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(IN_A_ROW):
            body(stream)
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / IN_A_ROW)
    return statistics.median(times)


class Runs:
    """Kernels and the product of some rows with ``weight``, bf16 [OUT, HIDDEN]."""

    def __init__(self, kernels: ctypes.CDLL, weight: Any, rows: int, orders: list[list[int]]) -> None:  # noqa: ANN401
        import torch

        self.kernels, self.weight, self.orders = kernels, weight, orders
        self.source = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.copy = torch.empty_like(self.source)
        self.out = torch.empty(rows, OUT, device="cuda", dtype=torch.bfloat16)
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self.places = torch.zeros(multiprocessors // 2 * 2, device="cuda", dtype=torch.int32)

    def before(self, shape: Shape, stream: Any) -> None:  # noqa: ANN401
        """Launch the kernel before the product."""
        vectors = self.source.numel() * self.source.element_size() // 16
        status = self.kernels.launch_before(
            self.source.data_ptr(), self.copy.data_ptr(), vectors, LEAST_NS, shape.lets_in, shape.early, shape.blocks,
            shape.threads, shape.cluster, stream.cuda_stream,
        )  # fmt: skip
        assert status == 0, (shape, status)

    def product(self) -> None:
        """The product, on torch's current stream."""
        import torch

        torch.mm(self.copy, self.weight.t(), out=self.out)

    def order(self) -> int:
        """The number of the order in which multiprocessors are given to blocks now."""
        import torch

        stream = torch.cuda.current_stream().cuda_stream
        status = self.kernels.launch_where(self.places.data_ptr(), len(self.places), stream)
        assert status == 0, status
        found = self.places.tolist()
        if found not in self.orders:
            self.orders.append(found)
        return self.orders.index(found)

    def behind(self, shape: Shape) -> dict[str, Any]:
        """Measure a shape before the product."""

        def both(stream: Any) -> None:  # noqa: ANN401
            self.before(shape, stream)
            self.product()

        alone = microseconds(lambda stream: self.before(shape, stream))
        with_product = microseconds(both)
        return {
            "part": "behind",
            "rows": len(self.source),
            **shape._asdict(),
            "alone_us": round(alone, 2),
            "product_us": round(with_product - alone, 2),
            "places": self.order(),
        }

    def made(self, shape: Shape) -> float:
        """Of the product alone, after kernels of that shape, in microseconds."""
        microseconds(lambda stream: self.before(shape, stream))
        return round(microseconds(lambda _: self.product()), 2)

    def left(self, shape: Shape, made_by: Shape) -> dict[str, Any]:
        """Measure the product after a shape that ran after ``made_by``."""
        was = self.made(made_by)
        was_places = self.order()
        now = self.made(shape)
        return {
            "part": "left",
            "rows": len(self.source),
            **shape._asdict(),
            "was_us": was,
            "was_places": was_places,
            "product_us": now,
            "places": self.order(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    import torch

    from llm_allreduce_plugin.measure.environment import write_record

    weight = torch.randn(OUT, HIDDEN, device="cuda", dtype=torch.bfloat16)
    found: list[dict[str, Any]] = []
    orders: list[list[int]] = []
    with tempfile.TemporaryDirectory() as folder:
        kernels = compiled(Path(folder))
        runs = Runs(kernels, weight, 8, orders)
        for shape in left_shapes():
            for made_by in (MAKES_FAST, MAKES_SLOW):
                found.append(runs.left(shape, made_by))
                print(found[-1], flush=True)
        for rows in ROWS:
            runs = Runs(kernels, weight, rows, orders)
            for shape in shapes(rows):
                found.append(runs.behind(shape))
                print(found[-1], flush=True)
    behind = [row for row in found if row["part"] == "behind"]
    for rows, group in itertools.groupby(behind, key=lambda row: row["rows"]):
        times = [row["product_us"] for row in group]
        print(f"{rows} rows: the product takes {min(times)} to {max(times)} us")
    if arguments.out:
        write_record(arguments.out, found, harness=__doc__, orders=[" ".join(map(str, order)) for order in orders])


if __name__ == "__main__":
    main()
