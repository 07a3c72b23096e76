"""llm-allreduce breakeven: from which link bandwidth down compression pays."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from llm_allreduce_plugin.base.validation import printable
from llm_allreduce_plugin.cli import options, outputs
from llm_allreduce_plugin.cli.options import parse_bytes
from llm_allreduce_plugin.compression.breakeven.model import CodecSpeed
from llm_allreduce_plugin.compression.breakeven.record import read
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.errors import UnreadableFileError

EPILOG = options.epilog(
    "llm-allreduce breakeven --bytes 16M --tp 8",
    "llm-allreduce breakeven --cpu --json codecs.json --plot codecs.png",
    "llm-allreduce breakeven --from benchmarks/h100/breakeven.json --tp 8",
)


def _measured(payload: int, size: str, *, cpu: bool) -> tuple[dict[WireFormat, CodecSpeed], str]:
    """The speed of every codec here, and where that is. ``size``: what ``--bytes`` says, for errors.

    Raises:
        typer.BadParameter: there is not that much memory.
    """
    import torch

    from llm_allreduce_plugin.compression.breakeven.measure import codec_speed

    on_gpu = torch.cuda.is_available() and not cpu
    device = torch.device("cuda" if on_gpu else "cpu")
    where = torch.cuda.get_device_name(0) if on_gpu else "the CPU, which says nothing about a GPU"
    try:
        return {wire: codec_speed(wire, payload, device) for wire in WireFormat}, where
    except RuntimeError as error:
        # torch has a class for the GPU's memory alone. Of the CPU's it says "can't allocate memory".
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        message = f"--bytes {size}: {'a GPU' if on_gpu else 'the CPU'} of this node has not that much memory: give less"
        raise typer.BadParameter(message) from None


def _recorded(path: Path) -> tuple[dict[WireFormat, CodecSpeed], str]:
    """What ``--json`` wrote.

    Raises:
        typer.BadParameter: it cannot be read, or is something else.
    """
    try:
        record = read(path)
    except UnreadableFileError as error:
        raise typer.BadParameter(printable(f"--from {error}")) from None
    return record.speeds(), record.where


def breakeven(
    *,
    size: Annotated[str, typer.Option("--bytes", metavar="SIZE", help="Message, in bytes per rank.")] = "64M",
    ranks: Annotated[int, typer.Option("--tp", "--ranks", min=2, max=8, help="Number of ranks.")] = 4,
    hosts: Annotated[int, typer.Option("--hosts", min=2, max=64, help="Hosts between which sums travel, too.")] = 2,
    cpu: Annotated[bool, typer.Option("--cpu", help="The CPU's codecs, even where there is a GPU.")] = False,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Codec speeds that --json wrote, instead of measuring."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers here.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw it (png, svg, pdf).")] = None,
) -> None:
    """Compare exact and compressed all-reduces over links of any bandwidth.

    Times this device's encoding and decoding, and works out the rest: what is sent, divided by the bandwidth, and
    nothing overlapped. Of small messages, whose time is latency, it says nothing; `bench` measures those.
    """
    from llm_allreduce_plugin.compression.breakeven import model

    outputs.check_file("--json", json_file)
    outputs.check_picture("--plot", plot)
    payload = parse_bytes("--bytes", size)
    options.check_holds_element("--bytes", size, payload, "bfloat16")
    speeds, where = _measured(payload, size, cpu=cpu) if source is None else _recorded(source)
    typer.echo(f"# codecs measured on {where}; {ranks} ranks")
    for wire, speed in speeds.items():
        typer.echo(f"# {wire}: encodes {speed.encode:.4g} GB/s of bf16, decodes {speed.decode:.4g} GB/s")
    typer.echo(model.table(payload, ranks, speeds, hosts))
    if json_file is not None:
        from llm_allreduce_plugin.measure.environment import write_record

        rows = [
            {
                "wire_format": str(wire),
                **dataclasses.asdict(speed),
                "pays_below": model.break_even(ranks, wire, speed),
                "pays_below_between_hosts": model.break_even_between(hosts, wire, speed),
            }
            for wire, speed in speeds.items()
        ]
        with outputs.writing("--json", json_file):
            write_record(json_file, rows, bytes=payload, ranks=ranks, hosts=hosts, where=where, unit="GB/s")
    if plot is not None:
        from llm_allreduce_plugin.compression.breakeven.plot import draw

        with outputs.writing("--plot", plot):
            draw(payload, ranks, speeds, f"codecs of {where}", plot)
