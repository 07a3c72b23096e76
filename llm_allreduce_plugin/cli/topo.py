"""llm-allreduce topo: the links between GPUs, and which strategies they allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llm_allreduce_plugin.algorithms.strategies import STRATEGIES
from llm_allreduce_plugin.cli import options
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.errors import TopologyError
from llm_allreduce_plugin.group.capabilities import group_facts, strategy_table
from llm_allreduce_plugin.group.multicast import node_outlook
from llm_allreduce_plugin.topology import NodeTopology, View, view_of
from llm_allreduce_plugin.topology.fabric import SUCCESS, domain_name, domain_notes, domain_obstacle
from llm_allreduce_plugin.topology.links import Transport

_LEGEND = """\
Legend:
  X    = self
  NV#  = a bond of # NVLinks
  PIX  = at most one PCIe bridge
  PXB  = several PCIe bridges, no host bridge
  PHB  = a PCIe host bridge (usually the CPU)
  NODE = host bridges within a NUMA node
  SYS  = the link between NUMA nodes (UPI, Infinity Fabric)
  NET  = another host"""

EPILOG = options.epilog(
    "llm-allreduce topo",
    "llm-allreduce topo --tp 4",
    "llm-allreduce topo --json > node.json",
    "llm-allreduce topo --topology node.json",
)


def _grid(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _matrix(view: View) -> str:
    """Links; and where CUDA counts otherwise than ``nvidia-smi``, or not all, what it calls each GPU."""
    topology = view.node
    names = [f"GPU{gpu.index}" for gpu in topology.gpus]
    ordinals = {position: f"cuda:{ordinal}" for ordinal, position in enumerate(view.positions)}
    rows = [["", *names, "NUMA", *([] if view.is_plain else ["CUDA"])]]
    for position, gpu in enumerate(topology.gpus):
        numa = "?" if gpu.numa_node is None else str(gpu.numa_node)
        called = [] if view.is_plain else [ordinals.get(position, "hidden")]
        rows.append([names[position], *topology.links[position], numa, *called])
    return _grid(rows)


def _by_host(topology: NodeTopology) -> list[str]:
    """Links inside each host, those that are alike once; and what joins them."""
    alike: dict[str, list[int]] = {}
    for host in dict.fromkeys(gpu.host for gpu in topology.gpus):
        part = topology.subset([at for at, gpu in enumerate(topology.gpus) if gpu.host == host])
        first = part.gpus[0].index  # a rack may count its GPUs through
        gpus = tuple(gpu.model_copy(update={"host": 0, "index": gpu.index - first}) for gpu in part.gpus)
        part = part.model_copy(update={"gpus": gpus})
        text = "\n".join([_matrix(View(part, tuple(range(len(gpus))))), *_gpu_lines(part)])
        alike.setdefault(text, []).append(host)
    lines: list[str] = []
    for text, hosts in alike.items():
        lines += [f"Host{'s' * (len(hosts) > 1)} {_ranges(hosts)}{', each' if len(hosts) > 1 else ''}:", text, ""]
    between = {
        topology.links[a][b]
        for a, gpu in enumerate(topology.gpus)
        for b, other in enumerate(topology.gpus)
        if gpu.host != other.host
    }
    fabrics = [gpu.fabric for gpu in topology.gpus]
    lines.append(f"Between hosts: {', '.join(sorted(between))}")
    if (obstacle := domain_obstacle(fabrics)) is not None:
        lines.append(f"No NVLink domain over these hosts: {obstacle}")
    return [*lines, *(f"Fabric: {note}" for note in domain_notes(fabrics))]


def _gpu_lines(topology: NodeTopology) -> list[str]:
    """GPUs that are alike share a line."""
    lines: dict[str, list[int]] = {}
    for gpu in topology.gpus:
        architecture = f"sm_{gpu.architecture}" if gpu.architecture else "architecture unknown"
        multicast = {True: "multicast", False: "no multicast", None: "multicast unknown"}[gpu.multicast]
        fabric = f"fabric {gpu.fabric.state}" if gpu.fabric else "no fabric"
        if gpu.fabric is not None and gpu.fabric.status not in ("", SUCCESS):
            fabric += f" with {gpu.fabric.status!r}"
        if gpu.fabric is not None and gpu.fabric.cluster_uuid:
            fabric += f" ({domain_name(gpu.fabric)})"
        lines.setdefault(f"{gpu.name}, {architecture}, {multicast}, {fabric}", []).append(gpu.index)
    return [f"GPU {_ranges(indices)}: {text}" for text, indices in lines.items()]


def _ranges(indices: list[int]) -> str:
    if len(indices) > 1 and indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}-{indices[-1]}"
    return ",".join(map(str, indices))


def _p2p_line(topology: NodeTopology) -> str:
    statuses = {status for row in topology.p2p for status in row if status != "X"}
    if not statuses:
        return "no pairs"
    if statuses == {"OK"}:
        return "OK between all pairs (as the driver says; proved with real bytes when a group starts)"
    return topology.p2p_fault() or "not known for all pairs"


def render(view: View, world_size: int | None) -> str:
    """The report for people: the links of the whole node, and strategies for GPUs that are visible.

    Raises:
        ValueError: fewer than ``world_size`` GPUs are visible.
    """
    topology = view.node
    if not topology.gpus:
        parts = [f"No GPUs: {topology.note or 'none listed'}"]
    else:
        parts = _by_host(topology) if topology.hosts > 1 else [_matrix(view), "", *_gpu_lines(topology)]
        parts.append(f"NVSwitch: {'yes' if topology.nvswitch else 'no'}    driver: {topology.driver or 'unknown'}")
        parts.append(f"Peer access: {_p2p_line(topology)}")
        of_a_host = sum(gpu.host == topology.gpus[0].host for gpu in topology.gpus)
        parts.append(f"Multicast: {node_outlook(topology, of_a_host)}")
        parts += [*filter(None, [topology.note, view.hidden_text]), *view.notes]
    if view.hidden and world_size is not None and world_size > len(view.positions):
        seen = f"this process sees {len(view.positions)} of the node's {len(topology.gpus)} GPUs ({view.cause})"
        message = f"world size {world_size}: {seen}"
        raise ValueError(message)
    facts = group_facts(view.topology, world_size)
    through = {Transport.SYMMETRIC: "each other's memory", Transport.HOST: "pinned host memory"}.get(facts.transport)
    parts += ["", f"Strategies for a group of {facts.world_size}{f' through {through}' if through else ''}:"]
    defaults = AllReduceConfig()
    rows = [
        [
            f"  {name}",
            "yes" if reason is None else "no",
            reason or STRATEGIES[name].describe(defaults, facts)[1],
        ]
        for name, reason in strategy_table(facts)
    ]
    parts.append(_grid(rows))
    if topology.gpus:
        parts += ["", _LEGEND]
    return "\n".join(parts)


def topo(
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: the topology, in the form that --topology reads.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--topology",
            "--from",
            metavar="FILE",
            help="A node recorded with --json, instead of this one.",
            autocompletion=options.complete_topology,
        ),
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            "--tp", min=1, max=options.MOST_RANKS, help="Group size to judge strategies for; default: all GPUs."
        ),
    ] = None,
) -> None:
    """Print how GPUs are linked, as `nvidia-smi topo -m` does, and which strategies can run and why not."""
    try:
        topology = NodeTopology.detect() if source is None else NodeTopology.from_json(source)
        if as_json:
            typer.echo(json.dumps(topology.model_dump(mode="json"), indent=1))
            return
        view = view_of(topology) if source is None else View(topology, tuple(range(len(topology.gpus))))
        typer.echo(render(view, world_size))
    except (TopologyError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
