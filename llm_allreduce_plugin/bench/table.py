"""The tables, in the form of nccl-tests, and side by side."""

from __future__ import annotations

from llm_allreduce_plugin.bench.worker import Measurement

HEADER = """\
#                                               out-of-place                       in graph
#       size         count       type  redop     time   algbw   busbw  #wrong      time   algbw   busbw  #wrong
#        (B)    (elements)                       (us)  (GB/s)  (GB/s)              (us)  (GB/s)  (GB/s)"""


def bandwidths(payload_bytes: int, microseconds: float, world_size: int) -> tuple[float, float]:
    """Algorithm and bus bandwidth in GB/s, as nccl-tests define them for all-reduce."""
    algorithm = payload_bytes / microseconds / 1e3
    return algorithm, algorithm * 2 * (world_size - 1) / world_size


def _half(payload_bytes: int, microseconds: float | None, wrong: int | None, world_size: int) -> str:
    if microseconds is None:
        return f"{'-':>8}  {'-':>6}  {'-':>6}  {'-':>6}"
    algorithm, bus = bandwidths(payload_bytes, microseconds, world_size)
    return f"{microseconds:>8.2f}  {algorithm:>6.2f}  {bus:>6.2f}  {'N/A' if wrong is None else wrong:>6}"


def line(row: Measurement, dtype: str, world_size: int, hidden: int | None = None) -> str:
    """One row. ``hidden``: elements of a row that is normed; None: only sums are made."""
    count, does = (str(row.count), "sum") if hidden is None else (f"{row.count // hidden}x{hidden}", "norm")
    start = f"{row.bytes:>12}  {count:>12}  {dtype:>9}  {does:>5} "
    if row.left_out:
        return f"{start} left out: {row.left_out}"
    eager = _half(row.bytes, row.eager_us, row.eager_wrong, world_size)
    return f"{start}{eager}  {_half(row.bytes, row.graph_us, row.graph_wrong, world_size)}"


def side_by_side(rows: list[Measurement], names: list[str]) -> str:
    """Time per call of every candidate at every size (in a graph where there is one); the fastest marked."""
    times = {(row.bytes, row.candidate): row.time_us for row in rows}
    width = max(10, *(len(name) + 2 for name in names))
    lines = ["#  us per call " + "".join(f"{name:>{width}}" for name in names)]
    for size in sorted({row.bytes for row in rows}):
        measured = [times.get((size, name)) for name in names]
        best = min((value for value in measured if value is not None), default=None)
        cells = ["-" if value is None else f"{value:.2f}{'*' if value == best else ' '}" for value in measured]
        lines.append(f"{size:>13} " + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)
