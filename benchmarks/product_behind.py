"""How long a matrix product takes behind kernels of different grids, and which state they leave a GPU in.

    python benchmarks/product_behind.py --out benchmarks/h100/product_behind.json

Compiles benchmarks/product_behind.cu with nvcc (sm_90 and newer). The product is that of a Llama's gate and up
projections, [m, 8192] x [8192, 28672] in bf16, by cuBLAS. Before it stands a kernel that copies the product's input and
takes 4 us, of so many blocks and threads; ``early``: it may start while the kernel before it drains; ``lets_in``: it
lets the next one start as soon as it starts itself. First that kernel alone, 12 in a row in a CUDA graph, then with the
product behind each; ``product_us`` is the difference. Shapes come in an order that matters: what one leaves behind, the
next ones find. ``neighbours``: of a kernel of clusters of two blocks, one block to a multiprocessor, launched after
that, how many clusters had multiprocessors 2k and 2k + 1.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
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


def shapes(rows: int) -> Iterator[Shape]:
    """In the order in which they are measured."""
    grids = ((rows, 512), (rows, 1024), (132, 1024), (128, 256), (1, 1024), (66, 1024), (264, 512))
    for blocks, threads in dict.fromkeys(grids):
        for early, lets_in in ((False, False), (True, False), (True, True), (False, True)):
            yield Shape(blocks, threads, early, lets_in)


def neighbours(multiprocessors: Sequence[int]) -> int:
    """How many clusters of two blocks have multiprocessors 2k and 2k + 1."""
    pairs = zip(multiprocessors[::2], multiprocessors[1::2], strict=True)
    return sum(one != other and one // 2 == other // 2 for one, other in pairs)


def compiled(folder: Path) -> ctypes.CDLL:
    """The kernels, for the first GPU."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    library = folder / "product_behind.so"
    command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)  # noqa: S603
    kernels = ctypes.CDLL(str(library))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    kernels.launch_before.argtypes = [pointer, pointer, ctypes.c_uint32, ctypes.c_uint32, *[integer] * 4, pointer]
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


def measure(kernels: ctypes.CDLL, weight: Any, rows: int, shape: Shape) -> dict[str, Any]:  # noqa: ANN401
    """One shape before the product of so many rows with ``weight``, bf16 [OUT, HIDDEN]."""
    import torch

    source = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    copy = torch.empty_like(source)
    product = torch.empty(rows, OUT, device="cuda", dtype=torch.bfloat16)
    vectors = source.numel() * source.element_size() // 16

    def before(stream: Any) -> None:  # noqa: ANN401
        status = kernels.launch_before(
            source.data_ptr(), copy.data_ptr(), vectors, LEAST_NS, shape.lets_in, shape.early, shape.blocks,
            shape.threads, stream.cuda_stream,
        )  # fmt: skip
        assert status == 0, status

    def with_product(stream: Any) -> None:  # noqa: ANN401
        before(stream)
        torch.mm(copy, weight.t(), out=product)

    alone, both = microseconds(before), microseconds(with_product)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    places = torch.zeros(multiprocessors // 2 * 2, device="cuda", dtype=torch.int32)
    status = kernels.launch_where(places.data_ptr(), len(places), torch.cuda.current_stream().cuda_stream)
    assert status == 0, status
    return {
        "rows": rows,
        **shape._asdict(),
        "alone_us": round(alone, 2),
        "product_us": round(both - alone, 2),
        "neighbours": neighbours(places.tolist()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    import torch

    from llm_allreduce_plugin.measure.environment import write_record

    weight = torch.randn(OUT, HIDDEN, device="cuda", dtype=torch.bfloat16)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        kernels = compiled(Path(folder))
        for rows in ROWS:
            for shape in shapes(rows):
                found.append(measure(kernels, weight, rows, shape))
                print(found[-1], flush=True)
    for rows, group in itertools.groupby(found, key=lambda row: row["rows"]):
        times = [row["product_us"] for row in group]
        print(f"{rows} rows: the product takes {min(times)} to {max(times)} us")
    if arguments.out:
        write_record(arguments.out, found, harness=__doc__)


if __name__ == "__main__":
    main()
