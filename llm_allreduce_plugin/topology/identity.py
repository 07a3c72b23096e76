"""What makes a node the same as another for measurements: its kind of GPUs and links, not which ones they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from llm_allreduce_plugin.base.validation import printable
from llm_allreduce_plugin.topology.hosts import BETWEEN_HOSTS
from llm_allreduce_plugin.topology.links import TopologyClass, Transport
from llm_allreduce_plugin.topology.model import NodeTopology

FINGERPRINT_DIGITS = 16


@dataclasses.dataclass(frozen=True)
class NodeIdentity:
    """A node as a tuning profile knows it.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        name: of its GPUs, all kinds of them; of the CPU where ranks run on that.
        architecture: compute capability without the dot; None on CPU, or where GPUs differ.
        fingerprint: equal for nodes with the same GPUs and links, whatever their order and serial numbers.
        description: what the fingerprint is of, for people.
    """

    device: str
    name: str
    architecture: int | None
    fingerprint: str
    description: str

    @classmethod
    def of_gpus(cls, topology: NodeTopology, visible: str = "unknown GPU") -> NodeIdentity:
        """The identity of a node with GPUs; where NVML is missing, all that is known is what CUDA calls one of them."""
        if not topology.gpus:
            return cls("cuda", visible, None, _digest([visible]), f"{visible}, links unknown without NVML")
        names = sorted({gpu.name for gpu in topology.gpus})
        architectures = {gpu.architecture for gpu in topology.gpus}
        links = sorted({link for row in topology.links for link in row if link != "X"})
        fault = topology.p2p_fault()
        parts = [f"{len(topology.gpus)} x {' + '.join(names)}"]
        parts += [f"links {', '.join(links)}"] if links else []
        parts += ["NVSwitch"] if topology.nvswitch else []
        parts += ["no peer access between some"] if fault else []
        return cls(
            device="cuda",
            name=" + ".join(names),
            architecture=architectures.pop() if len(architectures) == 1 else None,
            fingerprint=fingerprint(topology),
            description="; ".join(parts),
        )

    @classmethod
    def of_cpu(cls) -> NodeIdentity:
        """This machine, as CPU ranks see it."""
        try:
            found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        except OSError:
            found = None
        name = printable(found[1].strip()) if found else platform.machine()
        facts = [platform.machine(), name, os.cpu_count() or 0]
        return cls("cpu", name, None, _digest(facts), f"{facts[2]} cores of {name}")


def _digest(facts: object) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_DIGITS]


def fingerprint(topology: NodeTopology) -> str:
    """A stable hash of GPU names and architectures, links, peer access and NVSwitch; the order of GPUs is nothing."""
    seen = [
        [
            gpu.name,
            gpu.architecture,
            sorted(
                [other.name, topology.links[i][j], topology.p2p[i][j]]
                for j, other in enumerate(topology.gpus)
                if i != j
            ),
        ]
        for i, gpu in enumerate(topology.gpus)
    ]
    return _digest([topology.nvswitch, sorted(seen, key=json.dumps)])


def positions_of(topology: NodeTopology, uuids: Sequence[str]) -> list[int]:
    """Where GPUs with these UUIDs (with or without ``GPU-``) are in a topology; empty unless all are known."""
    known = {gpu.uuid.removeprefix("GPU-"): position for position, gpu in enumerate(topology.gpus) if gpu.uuid}
    wanted = [uuid.removeprefix("GPU-") for uuid in uuids]
    return [known[uuid] for uuid in wanted] if all(uuid in known for uuid in wanted) else []


def topology_class(topology: NodeTopology, transport: Transport, positions: Sequence[int]) -> TopologyClass:
    """What the bytes of a group of GPUs travel over, as ``transport`` has its ranks reach each other.

    Of a group on several hosts that a network joins: inside each of them.
    """
    if transport is Transport.SHM:
        return TopologyClass.CPU
    if transport is Transport.HOST:
        return TopologyClass.HOST_MEMORY
    links = {topology.links[i][j] for i in positions for j in positions if i != j} - {BETWEEN_HOSTS}
    if transport is Transport.NONE or not links or "?" in links:
        return TopologyClass.UNKNOWN
    if not all(link.startswith("NV") for link in links):
        return TopologyClass.PCIE_PEER
    return TopologyClass.NVSWITCH if topology.nvswitch else TopologyClass.NVLINK
