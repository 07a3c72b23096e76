"""GPUs of a node and the links between them: what is said of them, whoever says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llm_allreduce_plugin.base.validation import PlainText

# Links as `nvidia-smi topo -m` calls them, nearest first after NVLink (NV<number of links>).
PCIE_LINKS = ("PIX", "PXB", "PHB", "NODE", "SYS")
_LINK = re.compile(r"X|NV[1-9]\d?|" + "|".join(PCIE_LINKS) + r"|NET|\?")
MOST_GPUS = 1024  # of one topology
# Peer-to-peer status as `nvidia-smi topo -p2p r` calls it.
P2P_MEANING = {
    "X": "self",
    "OK": "supported",
    "CNS": "chipset not supported",
    "GNS": "GPU not supported",
    "TNS": "topology not supported",
    "NS": "not supported",
    "DR": "disabled by a registry key",
    "?": "unknown",
}


def p2p_fault_text(pair: str, status: str) -> str | None:
    """What a peer-to-peer status says against a pair of GPUs, or None."""
    if status in ("X", "OK", "?"):
        return None
    return f"{pair} have no peer access ({status}: {P2P_MEANING[status]})"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fabric(_Frozen):
    """The NVLink domain that a GPU is registered in (NVML's GPU fabric info), and what its use takes."""

    state: PlainText = Field(description="completed, in progress, not started, not supported")
    status: PlainText = Field(default="", description="success, or NVML's error; empty: not known")
    cluster_uuid: PlainText = Field(default="", description="empty where NVML gives zeros")
    clique_id: int = Field(default=0, ge=0, lt=1 << 32)
    handles: bool | None = Field(default=None, description="memory can be exported to other hosts; None: not known")
    imex_channel: bool | None = Field(
        default=None, description="there is an IMEX channel that this user may open; None: not known"
    )


class Gpu(_Frozen):
    """One GPU."""

    index: int = Field(ge=0, lt=MOST_GPUS, description="on its host, as nvidia-smi counts")
    name: PlainText
    architecture: int | None = Field(
        default=None, ge=10, lt=1000, description="compute capability without the dot: 90 for H100/H200"
    )
    multiprocessors: int | None = Field(
        default=None, gt=0, lt=1 << 16, description="streaming multiprocessors; None: not known"
    )
    pci_bus_id: PlainText = ""
    uuid: PlainText = ""
    host: int = Field(default=0, ge=0, lt=MOST_GPUS, description="which node of an NVLink domain; 0 when there is one")
    numa_node: int | None = Field(default=None, ge=0, lt=1 << 16, description="None: not known")
    multicast: bool | None = Field(default=None, description="NVLink multicast supported; None: not known")
    fabric: Fabric | None = None


class Node(_Frozen):
    """GPUs and the links between them.

    Attributes:
        source: where this was read: ``"nvml"``, a file, or a sentence about how it was made.
        gpus: in NVML's order (PCI bus order).
        links: ``links[i][j]`` is ``X`` on the diagonal, ``NV<n>`` for n NVLinks, otherwise the nearest common PCIe
            ancestor: PIX (one switch), PXB (several switches), PHB (host bridge), NODE (NUMA node), SYS (between
            sockets), NET (another host).
        p2p: ``p2p[i][j]`` is the driver's word on peer access: OK, CNS, GNS, TNS, NS, DR, or ``?``.
        nvswitch: the NVLinks go through switches.
        driver: driver version, empty when unknown.
        note: why there is nothing to see, when there is nothing, or which GPUs are left out.
    """

    source: PlainText = ""
    gpus: tuple[Gpu, ...] = Field(default=(), max_length=MOST_GPUS)
    links: tuple[tuple[str, ...], ...] = ()
    p2p: tuple[tuple[str, ...], ...] = ()
    nvswitch: bool = False
    driver: PlainText = ""
    note: PlainText = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        size = len(self.gpus)
        for name, matrix in (("links", self.links), ("p2p", self.p2p)):
            if len(matrix) != size or any(len(row) != size for row in matrix):
                message = f"{name} must be a {size} x {size} matrix, one row per GPU"
                raise ValueError(message)
        for i, row in enumerate(self.links):
            for j, link in enumerate(row):
                if not _LINK.fullmatch(link) or (link == "X") != (i == j):
                    allowed = f"X on the diagonal, elsewhere NV<n>, {', '.join(PCIE_LINKS)}, NET or ?"
                    message = f"links[{i}][{j}]={link!r}: must be {allowed}"
                    raise ValueError(message)
                if link != self.links[j][i]:
                    message = f"links[{i}][{j}]={link!r} but links[{j}][{i}]={self.links[j][i]!r}: must be equal"
                    raise ValueError(message)
        for i, row in enumerate(self.p2p):
            for j, status in enumerate(row):
                if status not in P2P_MEANING:
                    message = f"p2p[{i}][{j}]={status!r}: must be one of {', '.join(P2P_MEANING)}"
                    raise ValueError(message)
        return self

    @property
    def hosts(self) -> int:
        """Hosts that the GPUs are spread over."""
        return len({gpu.host for gpu in self.gpus})

    def name_of(self, position: int) -> str:
        """What the GPU at this position is called, as ``nvidia-smi`` and ``llm-allreduce topo`` count: ``GPU3``."""
        gpu = self.gpus[position]
        return f"GPU{gpu.index}" if self.hosts == 1 else f"GPU{gpu.index} of host {gpu.host}"

    @property
    def has_nvlink(self) -> bool:
        """True when every pair of GPUs is joined by NVLink."""
        pairs = [link for i, row in enumerate(self.links) for j, link in enumerate(row) if i != j]
        return bool(pairs) and all(link.startswith("NV") for link in pairs)

    def nvlink_gap(self, positions: Sequence[int]) -> bool:
        """True when some pair of these GPUs is joined by PCIe only."""
        return any(self.links[a][b] in PCIE_LINKS for a in positions for b in positions)

    def p2p_fault(self, positions: Sequence[int] | None = None) -> str | None:
        """The first pair without peer access, in words; None when all have it or nothing is known against it."""
        members = list(range(len(self.gpus))) if positions is None else list(positions)
        for a in members:
            for b in members:
                if a != b and (fault := self._pair_fault(a, b)) is not None:
                    return fault
        return None

    def _pair_fault(self, a: int, b: int) -> str | None:
        return p2p_fault_text(f"{self.name_of(a)} and {self.name_of(b)}", self.p2p[a][b])

    def subset(self, positions: Sequence[int]) -> Self:
        """The same node with only the GPUs at these positions, in this order."""
        return self.model_copy(
            update={
                "gpus": tuple(self.gpus[i] for i in positions),
                "links": tuple(tuple(self.links[i][j] for j in positions) for i in positions),
                "p2p": tuple(tuple(self.p2p[i][j] for j in positions) for i in positions),
            }
        )
