"""Topologies that were recorded elsewhere: what they may hold, and whether it makes sense."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from llm_allreduce_plugin.base.files import parse_json, read_text
from llm_allreduce_plugin.base.validation import MOST_FAULTS, faults, printable
from llm_allreduce_plugin.errors import TopologyError, UnreadableFileError
from llm_allreduce_plugin.topology.node import PCIE_LINKS, Node


def read(path: Path) -> Node:
    """A recorded topology.

    Raises:
        TopologyError: naming the file and the field.
    """
    try:
        text = read_text(path)
    except UnreadableFileError as error:
        raise _wrong(path, [error.reason]) from error
    return parse(path, text)


def parse(path: Path, text: str) -> Node:
    """A topology from the text of a recorded one. ``path``: where it is from, for errors.

    Raises:
        TopologyError: naming the file and the field.
    """
    try:
        document = parse_json(path, text)
    except UnreadableFileError as error:
        raise _wrong(path, [error.reason]) from error
    if isinstance(document, dict) and "gpus" not in document:
        raise _wrong(path, ["gpus: must be there: a list of the node's GPUs, [] for a node without any"])
    try:
        # Strict, because pydantic otherwise reads "0-1" as the number -1, 1.0 as 1, and true as 1.
        topology = Node.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise _wrong(path, faults(error)) from None
    if found := list(itertools.islice(_contradictions(topology), MOST_FAULTS)):
        raise _wrong(path, found)
    return topology


def _wrong(path: Path, reasons: list[str]) -> TopologyError:
    # Of a file that cannot be read at all, the reason is about the file; else about a field of it.
    lines = [f"topology file {path}: {reason}" for reason in reasons]
    return TopologyError("\n".join(map(printable, lines)))


def _contradictions(topology: Node) -> Iterator[str]:
    """What each field allows by itself, and all of them together do not."""
    for field in ("index", "pci_bus_id", "uuid"):
        seen: dict[tuple[int, object], int] = {}
        for position, gpu in enumerate(topology.gpus):
            value = getattr(gpu, field)
            if value == "":  # not known
                continue
            first = seen.setdefault((gpu.host, value), position)
            if first != position:
                yield f"gpus[{position}].{field}={value!r}: is also that of gpus[{first}]"
    for i, gpu in enumerate(topology.gpus):
        for j, other in enumerate(topology.gpus):
            link = topology.links[i][j]
            if gpu.host != other.host and link in PCIE_LINKS:
                yield f"links[{i}][{j}]={link!r}: they are on hosts {gpu.host} and {other.host}: must be NV<n>, NET, ?"
            if gpu.host == other.host and link == "NET":
                yield f"links[{i}][{j}]='NET': both are on host {gpu.host}: NET is for links between hosts"
            if (topology.p2p[i][j] == "X") != (i == j):
                yield f"p2p[{i}][{j}]={topology.p2p[i][j]!r}: must be X on the diagonal and nowhere else"
