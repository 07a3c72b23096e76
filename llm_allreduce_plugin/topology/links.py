"""How ranks can reach each other, and what their bytes travel over."""

from __future__ import annotations

import enum


class Transport(enum.StrEnum):
    """How ranks see each other's bytes."""

    SYMMETRIC = "symmetric"  # GPU memory of peers, over NVLink or PCIe P2P
    HOST = "host"  # pinned host memory that all GPUs of the node see
    SHM = "shm"  # POSIX shared memory between CPU ranks
    NONE = "none"

    @property
    def in_words(self) -> str:
        """For people: which memory that is."""
        return f"{'peer' if self is Transport.SYMMETRIC else self.value} memory"


class TopologyClass(enum.StrEnum):
    """What a group's bytes travel over: what a seed table is for, and a profile from elsewhere must have in common."""

    NVSWITCH = "nvswitch"
    NVLINK = "nvlink"
    PCIE_PEER = "pcie_peer"
    HOST_MEMORY = "host_memory"
    CPU = "cpu"
    UNKNOWN = "unknown"

    @property
    def in_words(self) -> str:
        """For a reason: ``over ...``."""
        return {
            TopologyClass.NVSWITCH: "NVLink through switches",
            TopologyClass.NVLINK: "NVLink without switches",
            TopologyClass.PCIE_PEER: "PCIe peer access",
            TopologyClass.HOST_MEMORY: "host memory",
            TopologyClass.CPU: "the memory of CPU ranks",
            TopologyClass.UNKNOWN: "unknown links",
        }[self]
