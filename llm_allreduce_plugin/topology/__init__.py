"""What a node's GPUs are and how they are linked, from NVML or from a JSON file."""

from llm_allreduce_plugin.topology.identity import NodeIdentity, fingerprint, topology_class
from llm_allreduce_plugin.topology.model import Fabric, Gpu, NodeTopology
from llm_allreduce_plugin.topology.nvml import detect, numa_node_of, nvlink_gap, p2p_obstacle
from llm_allreduce_plugin.topology.visible import View, view_of, visible

__all__ = [
    "Fabric",
    "Gpu",
    "NodeIdentity",
    "NodeTopology",
    "View",
    "detect",
    "fingerprint",
    "numa_node_of",
    "nvlink_gap",
    "p2p_obstacle",
    "topology_class",
    "view_of",
    "visible",
]
