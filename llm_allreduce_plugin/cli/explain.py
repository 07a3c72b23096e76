"""llm-allreduce explain: what runs for a message, why, and why nothing else; without running anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_allreduce_plugin.algorithms import pulling
from llm_allreduce_plugin.algorithms.base import Message
from llm_allreduce_plugin.algorithms.decision import Decision
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.cli import options, outputs
from llm_allreduce_plugin.cli.decision_fields import decision_fields, fused_fields, range_fields
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.errors import ConfigError, TopologyError
from llm_allreduce_plugin.group.capabilities import cpu_facts, group_facts
from llm_allreduce_plugin.group.facts import ASSUMED_MULTIPROCESSORS
from llm_allreduce_plugin.group.layouts import peer_refusal, refusal_note
from llm_allreduce_plugin.profiles.search import with_profile
from llm_allreduce_plugin.selection import sweep as sweeps
from llm_allreduce_plugin.selection.policy import decide, decide_fused
from llm_allreduce_plugin.topology import NodeIdentity, NodeTopology, View, view_of
from llm_allreduce_plugin.topology.links import Transport

# No kernel handles these; that is what there is to explain.
OTHER_DTYPES = {"float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "float8_e4m3fn": 1}
EPILOG = options.epilog(
    "llm-allreduce explain --tokens 8 --hidden 8192 --tp 4",
    "llm-allreduce explain --topology configs/topologies/l40s_x8_two_numa.json --strategy LOWPRECISION --sweep",
    "llm-allreduce explain --bytes 64K --transport host --json",
    "llm-allreduce explain --fused --rows 16 --hidden 8192 --quant fp8-token",
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """The group that is spoken of.

    Attributes:
        where: in words.
        facts: what its decisions depend on.
        notes: what a reader should know about them.
    """

    where: str
    facts: GroupFacts
    notes: tuple[str, ...] = ()


def subject(topology_file: Path | None, world_size: int | None, config: AllReduceConfig, *, cpu: bool) -> Subject:
    """The group on a recorded node, on this node, or of CPU ranks where there are no GPUs.

    Raises:
        TopologyError: the file cannot be read.
        ConfigError: ``tuning_profile`` names a file that cannot be used, or a setting does not fit the ranks.
        ValueError: the node has fewer GPUs than ``world_size``, or this process sees none of them.
    """
    note: tuple[str, ...] = ()
    topology = NodeTopology()
    view: View | None = None
    if topology_file is not None:
        topology = NodeTopology.from_json(topology_file)
    elif not cpu:
        topology = NodeTopology.detect()
        if not topology.gpus:
            cpu = True
            note = (f"no GPUs here ({topology.note}); --topology FILE speaks of another node",)
        elif (view := view_of(topology)).hides_all:
            message = f"no GPU is visible: {view.hidden_text}: unset it, or give --cpu or --topology FILE"
            raise ValueError(message)
    if cpu:
        ranks = world_size or 2
        config.check_world_size(ranks)
        facts, ignored = with_profile(config, cpu_facts(ranks, config), NodeIdentity.of_cpu())
        return Subject(f"{ranks} CPU ranks", facts, note + ignored)
    seen = topology if view is None else view.topology
    refusal = peer_refusal()
    group = group_facts(seen, world_size, config, refusal)
    config.check_world_size(group.world_size)
    facts, ignored = with_profile(config, group, NodeIdentity.of_gpus(topology))
    names = dict.fromkeys(gpu.name for gpu in seen.gpus[: facts.world_size])
    source = "this node" if topology_file is None else topology_file.name
    where = f"{facts.world_size} x {' and '.join(names) or 'GPU'} ({source})"
    note = tuple(filter(None, [refusal_note(config.transport, refusal)]))
    counting = _counting(view, facts) if view else ()
    return Subject(where, facts, (*note, *_notes(seen, facts), *counting, *ignored))


def _counting(view: View, facts: GroupFacts) -> Iterator[str]:
    """Which GPUs the ranks are on, where that is not what one would think."""
    yield from view.notes
    members = view.positions[: facts.world_size]
    if members != tuple(range(len(members))):
        names = ", ".join(map(view.node.name_of, members))
        yield f"ranks 0 to {len(members) - 1} are on {names}"


def _notes(topology: NodeTopology, facts: GroupFacts) -> list[str]:
    notes = []
    if facts.transport is Transport.SYMMETRIC:
        if facts.multiprocessors is None:
            notes.append(
                f"how many multiprocessors the GPUs have is not known: the launch is that of {ASSUMED_MULTIPROCESSORS}"
            )
        notes.append("peer access is the driver's word; it is proved when a group starts, and by llm-allreduce check")
    elif facts.transport is Transport.HOST and (fault := topology.p2p_fault(range(facts.world_size))) is not None:
        notes.append(f"through host memory: {fault}")
    if len({gpu.architecture for gpu in topology.gpus[: facts.world_size]}) > 1:
        notes.append("the GPUs are of several architectures: a communicator refuses such a group")
    return notes


def _why_sent(decision: Decision, message: Message) -> str | None:
    """Why an input is sent although peers could read it in place; None where they do."""
    if decision.launch is None:
        return f"{decision.strategy} is not of this package"
    return pulling.obstacle(decision.launch, message)


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
    others = {"--bytes": size is not None, "--in-place": in_place, "--sweep": sweep, "--plot": plot is not None}
    if fused and any(others.values()):
        message = f"{next(name for name, given in others.items() if given)}: not with --fused, which takes whole rows"
        raise typer.BadParameter(message)
    element = (ELEMENT_BYTES | OTHER_DTYPES)[element_type]
    count = tokens * hidden if size is None else options.parse_bytes(size) // element
    what = f"{tokens} x {hidden}" if size is None else f"{count} elements"
    try:
        group = subject(topology, world_size, config, cpu=cpu)
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
        if sweep:
            document["ranges"] = [range_fields(found) for found in ranges]
        typer.echo(json.dumps(document, indent=1))
    else:
        via = "" if group.facts.transport is Transport.NONE else f", {group.facts.transport} memory"
        typer.echo(f"# {group.where}{via}, allreduce_strategy {config.allreduce_strategy}")
        for note in group.notes:
            typer.echo(f"# {note}")
        if sweep:
            typer.echo(f"# {element_type}, sizes in bytes per rank\n{sweeps.table(ranges)}")
        else:
            behind = f", then residual, norm{f' and {kind}' if kind else ''}" if fused else ""
            typer.echo(f"# {what} of {element_type}: {sweeps.size_text(count * element)} per rank{behind}\n{shown}")
            if sent is not None:
                typer.echo(f"  the input is sent: {sent}")
    if plot is not None:
        _draw(ranges, f"{group.where}, allreduce_strategy {config.allreduce_strategy}", element_type, plot)


def _draw(ranges: list[sweeps.SizeRange], title: str, dtype: str, path: Path) -> None:
    from llm_allreduce_plugin.cli.sweep_plot import draw

    with outputs.writing("--plot", path):
        draw(ranges, f"{title}, {dtype}", path)
