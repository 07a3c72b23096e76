"""llm-allreduce bench: every strategy beside what else is installed, with the flags and the table of nccl-tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES
from llm_allreduce_plugin.base import processes
from llm_allreduce_plugin.cli import options, outputs
from llm_allreduce_plugin.cli.bench_subject import Norm, Subject, candidates, norm_of, subject
from llm_allreduce_plugin.cli.options import parse_bytes, parse_dtype

if TYPE_CHECKING:
    from llm_allreduce_plugin.bench.candidates import OurSettings
    from llm_allreduce_plugin.bench.worker import Measurement
    from llm_allreduce_plugin.measure.ranks import RankPool

EPILOG = options.epilog(
    "llm-allreduce bench -b 4K -e 256M -f 4",
    "llm-allreduce bench --tp 2 --with ONESHOT,TWOSHOT,NCCL --json times.json --plot times.png",
    "llm-allreduce bench --transport host --with LOWPRECISION,NCCL",
    "llm-allreduce bench --cpu -b 1K -e 64K -f 8",
    "llm-allreduce bench --between 4096 -b 16K -e 2M --with MINLATENCY,NCCL",
    "llm-allreduce bench --fused --hidden 8192 --quant fp8 -b 16K -e 64M -f 4",
)

MOST_SIZES = 10_000


def message_sizes(smallest: int, largest: int, factor: int, step: int | None, *, halves: bool) -> list[int]:
    """Bytes per rank from ``smallest`` to ``largest``, times ``factor`` or plus ``step``; or also 3/2 of each.

    Raises:
        typer.BadParameter: the range is empty, or has more than ``MOST_SIZES``.
    """
    if largest < smallest:
        message = f"--maxbytes {largest} is less than --minbytes {smallest}"
        raise typer.BadParameter(message)
    sizes: list[int] = []
    size = smallest
    while size <= largest:
        if len(sizes) >= MOST_SIZES:  # a factor, of 2 at least, has fewer
            message = (
                f"--stepbytes {step}: from {smallest} to {largest} bytes there are more than {MOST_SIZES} sizes: "
                "give a larger step"
            )
            raise typer.BadParameter(message)
        sizes.append(size)
        if halves and size * 3 // 2 <= largest:
            sizes.append(size * 3 // 2)
        size = size + step if step else size * factor
    return sizes


def _devices(cpu: bool, ranks: int | None) -> tuple[str, int]:  # noqa: FBT001
    import torch

    available = 0 if cpu else torch.cuda.device_count()
    if cpu or available == 0:
        return "cpu", ranks or 2
    if ranks is not None and ranks > available:
        message = f"--tp {ranks}: this node has {available} GPUs"
        raise typer.BadParameter(message)
    if available == 1:
        message = "this node has one GPU, and an all-reduce needs two; try --cpu"
        raise typer.BadParameter(message)
    return "cuda", ranks or available


def _chosen(with_: list[str] | None, norm: Norm | None, device_type: str) -> tuple[str, ...]:
    known = candidates(norm, device_type)
    if not with_:
        return known
    wanted = [name for text in with_ for name in text.split(",") if name]
    by_lower = {name.lower(): name for name in known}
    if not wanted:
        message = f"--with {' '.join(with_)}: names nothing: must be one of {', '.join(known)}"
        raise typer.BadParameter(message)
    for name in wanted:
        if name.lower() not in by_lower:
            message = f"--with {name}: must be one of {', '.join(known)}"
            raise typer.BadParameter(message)
    return tuple(by_lower[name.lower()] for name in wanted)


def bench(
    *,
    minbytes: Annotated[
        str, typer.Option("--minbytes", "-b", metavar="SIZE", help="Smallest message, in bytes per rank.")
    ] = "1K",
    maxbytes: Annotated[str, typer.Option("--maxbytes", "-e", metavar="SIZE", help="Largest message.")] = "64M",
    stepfactor: Annotated[
        int, typer.Option("--stepfactor", "-f", min=2, max=options.MOST_IN_A_ROW, help="Factor between sizes.")
    ] = 2,
    stepbytes: Annotated[
        str | None, typer.Option("--stepbytes", "-i", metavar="SIZE", help="Fixed step between sizes.")
    ] = None,
    halves: Annotated[bool, typer.Option("--halves", help="Also one and a half times each size.")] = False,
    between: Annotated[
        int,
        typer.Option(
            "--between",
            min=0,
            max=1 << 17,
            metavar="K",
            help="In graphs, a product of depth K before each call.",
        ),
    ] = 0,
    ngpus: Annotated[
        int | None,
        typer.Option(
            "--tp", "--ngpus", "-g", min=2, max=options.MOST_RANKS, help="Ranks; default: all GPUs, or 2 CPU ranks."
        ),
    ] = None,
    iters: Annotated[
        int, typer.Option("--iters", "-n", min=1, max=options.MOST_TIMES, help="Calls in a graph, or in a row.")
    ] = 20,
    replays: Annotated[
        int, typer.Option("--replays", "-m", min=1, max=options.MOST_TIMES, help="Times that they are measured.")
    ] = 15,
    warmup_iters: Annotated[
        int, typer.Option("--warmup_iters", "-w", min=1, max=options.MOST_TIMES, help="Calls before.")
    ] = 3,
    datatype: Annotated[
        str,
        typer.Option(
            "--dtype", "--datatype", "-d", help="bfloat16, half or float.", autocompletion=options.complete_dtype
        ),
    ] = "bfloat16",
    op: Annotated[str, typer.Option("--op", "-o", help="Only sum.")] = "sum",
    check: Annotated[int, typer.Option("--check", "-c", min=0, max=1, help="Verify every result (1) or not (0).")] = 1,
    with_: Annotated[
        list[str] | None, typer.Option("--with", metavar="NAME", help="Only these; repeat, or separate by commas.")
    ] = None,
    transport: Annotated[
        str,
        typer.Option(
            "--transport",
            help="GPUs: auto, peer or host memory for our strategies.",
            autocompletion=options.complete_transport,
        ),
    ] = "auto",
    wire_format: Annotated[
        str,
        typer.Option("--wire-format", help=options.WIRE_FORMAT_HELP, autocompletion=options.complete_wire_format),
    ] = "fp8",
    fused: Annotated[bool, typer.Option("--fused", help=options.FUSED_HELP)] = False,
    hidden: Annotated[
        int | None, typer.Option("--hidden", min=1, max=1 << 20, help="With --fused, elements of a row; default: 8192.")
    ] = None,
    quant: Annotated[
        str | None, typer.Option("--quant", help=options.QUANT_HELP, autocompletion=options.complete_quant)
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="CPU ranks, even where there are GPUs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers here.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw them (png, svg, pdf).")] = None,
) -> None:
    """Time every strategy beside what else is installed, verify every result, print nccl-tests' table.

    Time is the median over replays, of the slowest rank. "out-of-place" are calls from the host in a row, "in graph"
    the same calls in a CUDA graph. #wrong: exact strategies must give the very bits of the rank-ordered fp32 sum;
    others may be off by what rounding can cost. `--fused` measures all-reduces with residual and norm behind them, ours
    in one kernel and in two; sizes are rounded down to whole rows. With `--between` products stand between calls in
    graphs, as in a model, and times are what calls add to those: less of each is hidden behind the one before.
    """
    outputs.check_file("--json", json_file)
    outputs.check_picture("--plot", plot)
    if op != "sum":
        message = f"--op {op}: must be sum"
        raise typer.BadParameter(message)
    settings = _settings(transport, wire_format)
    dtype = parse_dtype(datatype)
    norm = norm_of(fused=fused, hidden=hidden, quant=options.parse_quant(quant, fused=fused))
    step = parse_bytes("--stepbytes", stepbytes) if stepbytes else None
    smallest, largest = parse_bytes("--minbytes", minbytes), parse_bytes("--maxbytes", maxbytes)
    sizes = message_sizes(smallest, largest, stepfactor, step, halves=halves)
    element = ELEMENT_BYTES[dtype]
    if norm is None:
        options.check_holds_element("--minbytes", minbytes, smallest, dtype)
    counts = norm.counts(sizes, dtype) if norm else [size // element for size in sizes]
    device_type, ranks = _devices(cpu, ngpus)
    wanted = _chosen(with_, norm, device_type)
    if between and device_type == "cpu":
        message = f"--between {between}: products stand in CUDA graphs, which CPU ranks have none of; leave it out"
        raise typer.BadParameter(message)
    measured = subject(
        norm,
        settings,
        dtype=dtype,
        calls=iters,
        replays=replays,
        warmup=warmup_iters,
        check=bool(check),
        between=between,
    )
    where = _device_line(device_type, ranks)
    typer.echo(f"# llm-allreduce bench: {where}; {iters} calls x {replays} replays, median, slowest rank")
    if norm is not None:
        typer.echo(f"# with residual and norm, hidden size {norm.hidden}, {norm.quant or 'not quantized'}")
    if between:
        typer.echo(f"# in graphs behind matrix products of depth {between}: microseconds that calls add to those")
    rows: list[Measurement] = []

    def save() -> None:
        """What there is, also when a rank fails or a signal ends this."""
        if json_file is not None and rows:
            with outputs.writing("--json", json_file):
                _write(json_file, rows, where, ranks, measured)

    forget = processes.at_last(save)
    try:
        names = _measure(ranks, device_type, wanted, counts, measured, rows)
    finally:
        save()
        forget()
    _summary(rows, names, where, ranks, plot)


def _measure(
    ranks: int,
    device_type: str,
    wanted: tuple[str, ...],
    counts: list[int],
    measured: Subject,
    rows: list[Measurement],
) -> list[str]:
    """Fill ``rows``; the candidates that could be opened.

    Raises:
        typer.Exit: a rank failed.
    """
    from llm_allreduce_plugin.bench import worker
    from llm_allreduce_plugin.measure.ranks import FAILURES, RankPool, in_a_line

    try:
        with RankPool(ranks, device_type) as pool:
            refused: dict[str, str] = pool.run(worker.open_all, wanted, measured.settings, measured.options)[0]
            for name, reason in refused.items():
                typer.echo(f"# {name} is left out: {reason}")
            names = [name for name in wanted if name not in refused]
            _run(pool, names, counts, measured, ranks, rows)
            pool.run(worker.close_all)
    except FAILURES as error:
        typer.echo(f"error: {in_a_line(error)}", err=True)
        raise typer.Exit(1) from None
    return names


def _device_line(device_type: str, ranks: int) -> str:
    import torch

    if device_type == "cpu":
        return f"{ranks} CPU ranks"
    return f"{ranks} x {torch.cuda.get_device_name(0)}"


def _run(
    pool: RankPool, names: list[str], counts: list[int], measured: Subject, ranks: int, rows: list[Measurement]
) -> None:
    """Measure everything, printing as it comes; a bar on stderr tells how far it is when a person watches."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from llm_allreduce_plugin.bench import table, worker

    hidden = measured.norm.hidden if measured.norm else None
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("bench", total=len(names) * len(counts))
        for name in names:
            typer.echo(f"#\n# {name}\n{table.HEADER}")
            for count in counts:
                progress.update(task, description=f"{name} {count}")
                row = pool.run(worker.measure, name, count, measured.options, timeout_s=300)[0]
                rows.append(row)
                typer.echo(table.line(row, measured.options.dtype, ranks, hidden))
                progress.advance(task)


def _settings(transport: str, wire_format: str) -> OurSettings:
    from llm_allreduce_plugin.bench.candidates import OurSettings
    from llm_allreduce_plugin.config import TransportChoice, WireFormat

    for option, value, allowed in (
        ("--transport", transport, TransportChoice),
        ("--wire-format", wire_format, WireFormat),
    ):
        if value.lower() not in set(allowed):
            message = f"{option} {value}: must be one of {', '.join(allowed)}"
            raise typer.BadParameter(message)
    return OurSettings(transport.lower(), WireFormat(wire_format.lower()))


def _write(path: Path, rows: list[Measurement], where: str, ranks: int, subject_: Subject) -> None:
    from llm_allreduce_plugin.measure.environment import write_record

    measured = [dataclasses.asdict(row) for row in rows]
    write_record(
        path,
        measured,
        where=where,
        world_size=ranks,
        options=dataclasses.asdict(subject_.options) | dataclasses.asdict(subject_.settings),
    )


def _summary(rows: list[Measurement], names: list[str], where: str, ranks: int, plot: Path | None) -> None:
    from llm_allreduce_plugin.bench import table
    from llm_allreduce_plugin.bench.plot import draw

    typer.echo(f"#\n# side by side\n{table.side_by_side(rows, names)}")
    wrong = sum((row.eager_wrong or 0) + (row.graph_wrong or 0) for row in rows)
    unchecked = sum(row.eager_wrong is None and not row.left_out for row in rows)
    typer.echo(f"# Out of bounds values : {wrong} {'OK' if wrong == 0 else 'FAILED'}")
    if unchecked:
        typer.echo(f"# {unchecked} results were not checked")
    if plot is not None:
        with outputs.writing("--plot", plot):
            draw(rows, ranks, where, plot)
    if wrong:
        raise typer.Exit(1)
