"""llm-allreduce explain: what runs for a message, why, and why nothing else; without running anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_allreduce_plugin.algorithms import pulling
from llm_allreduce_plugin.algorithms.base import Message
from llm_allreduce_plugin.algorithms.decision import Decision
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES
from llm_allreduce_plugin.cli import hosts as hosts_option
from llm_allreduce_plugin.cli import options, outputs
from llm_allreduce_plugin.cli.decision_fields import decision_fields, fused_fields, range_fields
from llm_allreduce_plugin.cli.explain_subject import modelled, subject
from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.errors import ConfigError, TopologyError
from llm_allreduce_plugin.selection import sweep as sweeps
from llm_allreduce_plugin.selection.policy import decide, decide_fused
from llm_allreduce_plugin.topology.links import Transport

# No kernel handles these; that is what there is to explain.
OTHER_DTYPES = {"float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "float8_e4m3fn": 1}
EPILOG = options.epilog(
    "llm-allreduce explain --tokens 8 --hidden 8192 --tp 4",
    "llm-allreduce explain --topology configs/topologies/l40s_x8_two_numa.json --strategy LOWPRECISION --sweep",
    "llm-allreduce explain --bytes 64K --transport host --json",
    "llm-allreduce explain --hosts 2x8 --link 50GB/s --topology configs/topologies/h100_x8_nvswitch.json",
    "llm-allreduce explain --fused --rows 16 --hidden 8192 --quant fp8-token",
)


def _why_sent(decision: Decision, message: Message) -> str | None:
    """Why an input is sent although peers could read it in place; None where they do."""
    if decision.launch is None:
        return f"{decision.strategy} runs the engine's own all-reduce, which reads no input in place"
    return pulling.obstacle(decision.launch, message)


def _check_whole_rows(given: Mapping[str, bool]) -> None:
    """Of options that speak of other messages than whole rows, none is given."""
    if name := next((name for name, is_given in given.items() if is_given), None):
        message = f"{name}: not with --fused, which takes whole rows"
        raise typer.BadParameter(message)


def _elements(size: str, dtype: str, element_bytes: int) -> int:
    """Elements of a message of so many bytes."""
    payload = options.parse_bytes("--bytes", size)
    if payload % element_bytes:
        message = f"--bytes {size!r}: must be a multiple of {element_bytes}, the bytes of a {dtype}"
        raise typer.BadParameter(message)
    return payload // element_bytes


def _with_unit(payload_bytes: int) -> str:
    """``1000 bytes``, ``4 KiB``: exactly."""
    text = sweeps.size_text(payload_bytes)
    return f"{text} bytes" if text.isdecimal() else text


def _unused(wire_format: str | None, strategy: AllReduceStrategy) -> Iterator[str]:
    """A note where a wire format is given and nothing will use it."""
    if wire_format is not None and strategy is not AllReduceStrategy.LOWPRECISION:
        yield f"--wire-format {wire_format}: {strategy} never compresses, LOWPRECISION does"


def explain(
    *,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens",
            "--rows",
            min=0,
            max=options.MOST_IN_A_ROW,
            help="Tokens in the batch (rows of the message).",
        ),
    ] = 8,
    hidden: Annotated[
        int, typer.Option("--hidden", min=1, max=options.MOST_IN_A_ROW, help="Hidden size of the model (columns).")
    ] = 8192,
    size: Annotated[
        str | None, typer.Option("--bytes", metavar="SIZE", help="Message in bytes per rank, instead of those two.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            "--datatype",
            "-d",
            help="Element type: bf16, fp16, fp32, ...",
            autocompletion=options.complete_dtype,
        ),
    ] = "bf16",
    world_size: Annotated[
        int | None,
        typer.Option("--tp", min=1, max=options.MOST_RANKS, help="Ranks; default: all GPUs, or 2 CPU ranks."),
    ] = None,
    topology: Annotated[
        Path | None,
        typer.Option(
            "--topology",
            "--from",
            metavar="FILE",
            help="A node recorded with `topo --json`, instead of this one.",
            autocompletion=options.complete_topology,
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            help="allreduce_strategy, over file and environment.",
            autocompletion=options.complete_strategy,
        ),
    ] = None,
    transport: Annotated[
        str | None,
        typer.Option("--transport", help="GPUs: auto, peer or host.", autocompletion=options.complete_transport),
    ] = None,
    wire_format: Annotated[
        str | None,
        typer.Option("--wire-format", help=options.WIRE_FORMAT_HELP, autocompletion=options.complete_wire_format),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="CPU ranks, even where there are GPUs.")] = False,
    hosts: Annotated[str | None, typer.Option("--hosts", metavar="HxR", help=hosts_option.HOSTS_HELP)] = None,
    link: Annotated[str | None, typer.Option("--link", metavar="RATE", help=hosts_option.LINK_HELP)] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="The input lies in memory that peers see (`peer_visible_empty`).")
    ] = False,
    fused: Annotated[bool, typer.Option("--fused", help=options.FUSED_HELP)] = False,
    quant: Annotated[
        str | None, typer.Option("--quant", help=options.QUANT_HELP, autocompletion=options.complete_quant)
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="What runs from which size to which, 16 bytes to 1 GiB.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the sweep (png, svg, pdf).")] = None,
) -> None:
    """Say what runs for a message, why, and what speaks against each alternative.

    It is the decision that the engine makes, by the same code, from the same settings: `LLM_ALLREDUCE_CONFIG` and other
    variables count, and options here come over them. Nothing is run, so it needs no GPU: `--topology` takes a node that
    was recorded elsewhere.
    """
    outputs.check_picture("--plot", plot)
    config = options.configured(
        allreduce_strategy=strategy,
        transport=transport,
        low_precision=None if wire_format is None else {"wire_format": wire_format},
    )
    element_type = options.parse_dtype(dtype, OTHER_DTYPES)
    kind = options.parse_quant(quant, fused=fused)
    spread, network = hosts_option.parse_hosts(hosts), hosts_option.parse_link(link)
    if fused:
        _check_whole_rows({"--bytes": size is not None, "--in-place": in_place, "--sweep": sweep, "--plot": bool(plot)})
    element = (ELEMENT_BYTES | OTHER_DTYPES)[element_type]
    count = tokens * hidden if size is None else _elements(size, element_type, element)
    what = f"{tokens} x {hidden}" if size is None else f"{count} element{'s' * (count != 1)}"
    try:
        group = subject(topology, world_size, config, cpu=cpu, hosts=spread)
        group = dataclasses.replace(group, notes=(*group.notes, *_unused(wire_format, config.allreduce_strategy)))
        costs = modelled(group, hosts, network, element)
        wanted = sweep or plot is not None
        ranges = sweeps.sweep(config, group.facts, element_type, readable_in_place=in_place) if wanted else []
        normed = decide_fused(config, group.facts, tokens, hidden, element_type, kind) if fused else None
    except (ConfigError, TopologyError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    decision = decide(config, group.facts, count, element_type, readable_in_place=in_place)
    shown = decision if normed is None else normed
    sent = _why_sent(decision, Message(count, element_type, element, in_place)) if in_place else None
    if as_json:
        document: dict[str, Any] = {
            "group": {
                "where": group.where,
                "world_size": group.facts.world_size,
                "transport": str(group.facts.transport),
                "notes": list(group.notes),
            },
            "settings": config.model_dump(mode="json", exclude_unset=True),
            "message": {"count": count, "dtype": element_type, "bytes": count * element},
            "decision": decision_fields(decision) if normed is None else fused_fields(normed),
        }
        if fused:
            document["message"] |= {"rows": tokens, "hidden": hidden, "quant": kind}
        if in_place:
            document["message"] |= {"readable_in_place": True, "why_sent": sent}
        document |= {} if costs is None else {"modelled": costs.fields()}
        document |= {"ranges": [range_fields(found) for found in ranges]} if sweep else {}
        typer.echo(json.dumps(document, indent=1))
    else:
        via = "" if group.facts.transport is Transport.NONE else f", {group.facts.transport.in_words}"
        head = (f"{group.where}{via}, allreduce_strategy {config.allreduce_strategy}", *group.notes)
        typer.echo("\n".join(f"# {line}" for line in head))
        if sweep:
            whys = "".join(f"\n# {why}" for why in sweeps.whys(ranges))
            typer.echo(f"# {element_type}, sizes in bytes per rank\n{sweeps.table(ranges)}{whys}")
        else:
            behind = f", then residual, norm{f' and {kind}' if kind else ''}" if fused else ""
            typer.echo(f"# {what} of {element_type}: {_with_unit(count * element)} per rank{behind}\n{shown}")
            if sent is not None:
                typer.echo(f"  the input is sent: {sent}")
        if costs is not None:
            typer.echo(costs)
    if plot is not None:
        _draw(ranges, f"{group.where}, allreduce_strategy {config.allreduce_strategy}", element_type, plot)


def _draw(ranges: list[sweeps.SizeRange], title: str, dtype: str, path: Path) -> None:
    from llm_allreduce_plugin.cli.sweep_plot import draw

    with outputs.writing("--plot", path):
        draw(ranges, f"{title}, {dtype}", path)
