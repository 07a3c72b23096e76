"""How long a matrix product takes behind kernels of different grids, and where its blocks then run.

    python benchmarks/product_behind.py --out benchmarks/h100/product_behind.json

Compiles benchmarks/product_behind.cu with nvcc (sm_90 and newer). The product is that of a Llama's gate and up
projections, [m, 8192] x [8192, 28672] in bf16, by cuBLAS. A kernel before it takes 4 us; its first blocks, one to a row
as far as there are so many, copy the product's input. Its shape: blocks, threads, blocks of a cluster, and whether it
may start while the kernel before it drains (``early``) and lets the next one start as soon as it starts itself
(``lets_in``). That kernel alone, 12 in a row in a CUDA graph, then with the product behind each; ``product_us`` is the
difference. All shapes in turn, and then all of them again (``turn``).

``places``: a kernel of clusters of two blocks, one block to a multiprocessor, launched right behind the one of that
shape; a number for each order in which multiprocessors were given to its blocks. The orders stand in the record by that
number.
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
TURNS = 2


class Shape(NamedTuple):
    """Of the kernel before the product."""

    blocks: int
    threads: int
    early: bool
    lets_in: bool
    cluster: int = 0  # blocks; 0: launched without clusters, as most kernels are


def shapes() -> Iterator[Shape]:
    """In the order in which they are measured."""
    for blocks in (1, 8, 64, 66, 68, 96, 104, 128, 132, 264):
        yield Shape(blocks, 256, early=False, lets_in=False)
    for blocks in (8, 132):
        yield Shape(blocks, 1024, early=False, lets_in=False)
        yield Shape(blocks, 256, early=True, lets_in=False)
        yield Shape(blocks, 256, early=True, lets_in=True)
    clusters = {
        1: (1, 4, 5, 6, 7, 8, 12, 16, 64, 66, 68, 80, 88, 96, 104, 112, 120, 128, 131, 132, 264),
        2: (1, 4, 5, 6, 7, 8, 9, 32, 33, 37, 38, 39, 65, 66),
        4: (1, 2, 3, 4, 5, 8, 9, 17, 20, 32, 33),
        8: (1, 2, 3, 4, 5, 8, 9, 12, 16),
    }
    for cluster, numbers in clusters.items():
        for number in numbers:
            yield Shape(number * cluster, 256, early=False, lets_in=False, cluster=cluster)


def compiled(folder: Path) -> ctypes.CDLL:
    """The kernels, for the first GPU."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    library = folder / "product_behind.so"
    command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)  # noqa: S603
    kernels = ctypes.CDLL(str(library))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    kernels.launch_before.argtypes = [pointer, pointer, *[ctypes.c_uint32] * 3, *[integer] * 5, pointer]
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
    """Kernels and the product of some rows with ``weight``, bf16 [OUT, HIDDEN]; None: there is no product."""

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
        writers = min(shape.blocks, len(self.source))
        status = self.kernels.launch_before(
            self.source.data_ptr(), self.copy.data_ptr(), vectors, writers, LEAST_NS, shape.lets_in, shape.early,
            shape.blocks, shape.threads, shape.cluster, stream.cuda_stream,
        )  # fmt: skip
        assert status == 0, (shape, status)

    def product(self) -> None:
        """The product, on torch's current stream."""
        import torch

        torch.mm(self.copy, self.weight.t(), out=self.out)

    def order_behind(self, *shapes: Shape) -> int:
        """The number of the order in which multiprocessors are given to blocks behind kernels of these shapes."""
        import torch

        stream = torch.cuda.current_stream()
        for shape in shapes:
            self.before(shape, stream)
        status = self.kernels.launch_where(self.places.data_ptr(), len(self.places), stream.cuda_stream)
        assert status == 0, status
        found = self.places.tolist()
        if found not in self.orders:
            self.orders.append(found)
        return self.orders.index(found)

    def measure(self, shape: Shape) -> dict[str, Any]:
        """One shape."""

        def both(stream: Any) -> None:  # noqa: ANN401
            self.before(shape, stream)
            self.product()

        alone = microseconds(lambda stream: self.before(shape, stream))
        with_product = microseconds(both)
        return {
            **shape._asdict(),
            "alone_us": round(alone, 2),
            "product_us": round(with_product - alone, 2),
            "places": self.order_behind(shape),
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
        for rows in ROWS:
            runs = Runs(kernels, weight, rows, orders)
            for turn in range(TURNS):
                for shape in shapes():
                    found.append({"rows": rows, "turn": turn, **runs.measure(shape)})
                    print(found[-1], flush=True)
    for rows, group in itertools.groupby(found, key=lambda row: row["rows"]):
        times = [row["product_us"] for row in group]
        print(f"{rows} rows: the product takes {min(times)} to {max(times)} us")
    if arguments.out:
        write_record(arguments.out, found, harness=__doc__, orders=[" ".join(map(str, order)) for order in orders])


if __name__ == "__main__":
    main()
