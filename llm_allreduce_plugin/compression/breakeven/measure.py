"""How fast this device encodes and decodes, by the kernels that the all-reduces are made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.compression.breakeven.model import GIGA, CodecSpeed
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES

REPEATS = 9


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """The median time of one run."""
    times: list[float] = []
    for _ in range(REPEATS + 1):  # the first one warms up
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def codec_speed(wire: WireFormat, payload_bytes: int, device: torch.device) -> CodecSpeed:
    """Encoding and decoding of ``payload_bytes`` of bf16 normal data, alone on ``device``."""
    codec = CODECS[wire]
    values = torch.randn(payload_bytes // 2, device=device).bfloat16()
    packets = torch.empty(codec.bytes_of(values.numel()), dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    arguments = (codec.code, DTYPE_CODES[values.dtype])

    def encode() -> None:
        _C.encode(*arguments, values.data_ptr(), values.numel(), packets.data_ptr(), stream)

    def decode() -> None:
        _C.decode(*arguments, packets.data_ptr(), values.numel(), values.data_ptr(), stream)

    size = values.numel() * values.element_size() / GIGA
    return CodecSpeed(encode=size / _seconds(encode, device), decode=size / _seconds(decode, device))
