"""The part of a node that this process may use, as CUDA counts it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

from llm_allreduce_plugin.topology import cuda_order
from llm_allreduce_plugin.topology.cuda_order import VARIABLE
from llm_allreduce_plugin.topology.model import NodeTopology

ORDER_VARIABLE, BUS_ORDER = "CUDA_DEVICE_ORDER", "PCI_BUS_ID"

# Tells the UUIDs of all GPUs of the node in CUDA's order, or None.
Asker = Callable[[], Sequence[str] | None]


@dataclasses.dataclass(frozen=True)
class View:
    """A node as a process sees it.

    Attributes:
        node: all of it.
        positions: of the GPUs that are visible, in CUDA's order: the first is ``cuda:0``.
        cause: what hides the others, when some are hidden: ``"CUDA_VISIBLE_DEVICES='0,1'"``.
        notes: what had to be assumed.
    """

    node: NodeTopology
    positions: tuple[int, ...]
    cause: str = ""
    notes: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """True when CUDA counts all GPUs in the order of the node."""
        return self.positions == tuple(range(len(self.node.gpus)))

    @property
    def hidden(self) -> int:
        """GPUs that the process does not see."""
        return len(self.node.gpus) - len(self.positions)

    @property
    def hides_all(self) -> bool:
        """True when there are GPUs, and none is visible."""
        return bool(self.node.gpus) and not self.positions

    @property
    def hidden_text(self) -> str:
        """What is hidden and by what; empty when nothing is."""
        if not self.hidden:
            return ""
        if "MIG-" in self.cause and not self.positions:
            return f"{self.cause} names a MIG instance, which cannot reach the memory of others"
        return f"{self.cause} hides {f'{self.hidden} of {len(self.node.gpus)} GPUs' if self.positions else 'every GPU'}"

    @property
    def topology(self) -> NodeTopology:
        """The visible part, its GPUs in CUDA's order."""
        if self.is_plain:
            return self.node
        note = self.node.note if self.positions else self.hidden_text
        return self.node.subset(self.positions).model_copy(update={"note": note})


def view_of(topology: NodeTopology, environment: Mapping[str, str] = os.environ, ask: Asker | None = None) -> View:
    """What a process with this environment sees of a node.

    ``CUDA_VISIBLE_DEVICES`` as the driver reads it: numbers, or beginnings of UUIDs, up to the first that names no
    GPU. What a number means follows from ``CUDA_DEVICE_ORDER``: the order of the PCI bus, which is NVML's, when that
    is asked for or all GPUs are alike; otherwise whatever CUDA says when it is asked.

    Args:
        topology: the node, in NVML's order.
        environment: of the process.
        ask: how CUDA is asked; default: in a process of its own.
    """
    text = environment.get(VARIABLE)
    words = None if text is None else [word.strip() for word in text.split(",")]
    order: Sequence[int] = range(len(topology.gpus))
    notes: tuple[str, ...] = ()
    if (words is None or any(map(_is_number, words))) and not _has_bus_order(topology, environment):
        order, notes = _cuda_order(topology, ask)
    if words is None:
        return View(topology, tuple(order), notes=notes)
    positions: list[int] = []
    for word in words:
        position = _position(topology, word, order)
        if position is None or position in positions:
            break
        positions.append(position)
    return View(topology, tuple(positions), f"{VARIABLE}={text!r}", notes)


def visible(topology: NodeTopology, environment: Mapping[str, str] = os.environ) -> NodeTopology:
    """The visible part of a node, as of :func:`view_of`."""
    return view_of(topology, environment).topology


def _has_bus_order(topology: NodeTopology, environment: Mapping[str, str]) -> bool:
    alike = len({(gpu.name, gpu.architecture) for gpu in topology.gpus}) <= 1
    return alike or environment.get(ORDER_VARIABLE) == BUS_ORDER


def _cuda_order(topology: NodeTopology, ask: Asker | None) -> tuple[Sequence[int], tuple[str, ...]]:
    uuids = (ask or cuda_order.ask)() or ()
    known = {gpu.uuid: position for position, gpu in enumerate(topology.gpus)}
    order = [known[uuid] for uuid in uuids if uuid in known]
    if sorted(order) == list(range(len(topology.gpus))) and len(uuids) == len(order):
        return order, ()
    note = (
        "the GPUs differ, and CUDA could not be asked how it counts them: their numbers are taken to be those of "
        f"nvidia-smi; set {ORDER_VARIABLE}={BUS_ORDER} to make it so"
    )
    return range(len(topology.gpus)), (note,)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal()


def _position(topology: NodeTopology, word: str, order: Sequence[int]) -> int | None:
    if _is_number(word):
        # More digits than any number of GPUs has are not even read.
        return order[int(word)] if len(word) < 10 and int(word) < len(order) else None  # noqa: PLR2004
    found = [position for position, gpu in enumerate(topology.gpus) if word and gpu.uuid.startswith(word)]
    return found[0] if len(found) == 1 else None
