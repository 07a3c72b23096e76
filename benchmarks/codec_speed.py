"""What encoding and decoding reach on one GPU, by two builds of the library side by side.

    python benchmarks/codec_speed.py --old OLD.so --new NEW.so --out benchmarks/h100/codec_speed.json

``OLD.so``, ``NEW.so``: libllm_allreduce.so of each. Both code the same bf16 values, more than caches keep, by turns. A
row has the median of each, in TB/s of bf16, and new / old. Packets and decoded values of both must have the same bits.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llm_allreduce_plugin.config import WireFormat  # noqa: E402
from llm_allreduce_plugin.measure.environment import write_record  # noqa: E402
from llm_allreduce_plugin.oracle import CODECS  # noqa: E402
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES  # noqa: E402

TERA = 1e12


class Library:
    """The codecs of one build.

    Raises:
        OSError: the file is no library that can be loaded.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path.resolve()))
        word, pointer, count = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
        self._encode, self._decode = library.lar_encode_cuda, library.lar_decode_cuda
        self._size = library.lar_packet_size
        for function in (self._encode, self._decode):
            function.argtypes = [word, word, pointer, count, pointer, pointer]

    def knows(self, wire: WireFormat) -> bool:
        """Whether it has this format."""
        values, size = ctypes.c_int32(), ctypes.c_int32()
        return bool(self._size(CODECS[wire].code, ctypes.byref(values), ctypes.byref(size)) == 0)

    def encode(self, wire: WireFormat, values: torch.Tensor, packets: torch.Tensor) -> None:
        """Fills ``packets``."""
        self._call(self._encode, wire, values.dtype, values.data_ptr(), values.numel(), packets.data_ptr())

    def decode(self, wire: WireFormat, packets: torch.Tensor, values: torch.Tensor) -> None:
        """Fills ``values``."""
        self._call(self._decode, wire, values.dtype, packets.data_ptr(), values.numel(), values.data_ptr())

    @staticmethod
    def _call(function: Callable[..., int], wire: WireFormat, dtype: torch.dtype, *rest: int) -> None:
        status = function(CODECS[wire].code, DTYPE_CODES[dtype], *rest, torch.cuda.current_stream().cuda_stream)
        if status != 0:
            sys.exit(f"{wire}: the library says {status} where it should say 0")


def seconds(run: Callable[[], None], runs: int) -> float:
    """Of one run, of ``runs`` in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(runs):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / runs


def measure(libraries: dict[str, Library], wire: WireFormat, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each direction."""
    values = torch.randn(arguments.mib * (1 << 19), device="cuda").bfloat16()
    packets = {
        name: torch.empty(CODECS[wire].bytes_of(values.numel()), dtype=torch.uint8, device="cuda") for name in libraries
    }
    decoded = {name: torch.empty_like(values) for name in libraries}
    runs = {
        "encode": {name: lambda name=name: libraries[name].encode(wire, values, packets[name]) for name in libraries},
        "decode": {
            name: lambda name=name: libraries[name].decode(wire, packets[name], decoded[name]) for name in libraries
        },
    }
    rows = []
    for direction, of in runs.items():
        samples: dict[str, list[float]] = {name: [] for name in of}
        for index in range(arguments.rounds + 1):  # the first one warms up
            for name in sorted(of, reverse=index % 2 == 0):
                taken = seconds(of[name], arguments.runs)
                if index > 0:
                    samples[name].append(values.numel() * 2 / TERA / taken)
        row: dict[str, Any] = {"wire": str(wire), "direction": direction, "bytes": values.numel() * 2}
        row |= {f"{name}_tb_s": round(statistics.median(of_one), 3) for name, of_one in samples.items()}
        if len(samples) == 2:
            row["ratio"] = round(row["new_tb_s"] / row["old_tb_s"], 3)
        rows.append(row | {"samples": {name: [round(x, 3) for x in of_one] for name, of_one in samples.items()}})
    for outputs in (packets, {name: out.view(torch.int16) for name, out in decoded.items()}):
        first, *others = outputs.values()
        if not all(torch.equal(first, other) for other in others):
            sys.exit(f"{wire}: the two libraries have different bits")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True)
    parser.add_argument("--new", type=Path, required=True)
    parser.add_argument("--mib", type=int, default=256, help="of bf16")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    libraries = {"old": Library(arguments.old), "new": Library(arguments.new)}
    rows = []
    for wire in WireFormat:
        rows += measure({name: library for name, library in libraries.items() if library.knows(wire)}, wire, arguments)
        for row in rows[-2:]:
            print({key: value for key, value in row.items() if key != "samples"}, flush=True)
    if arguments.out:
        write_record(arguments.out, rows, mib=arguments.mib, runs=arguments.runs, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
