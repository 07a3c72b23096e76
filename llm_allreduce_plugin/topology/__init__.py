"""What a node's GPUs are and how they are linked, from NVML or from a JSON file."""

from llm_allreduce_plugin.topology.capabilities import cpu_facts, group_facts, multiprocessors, strategy_table
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
    "cpu_facts",
    "detect",
    "fingerprint",
    "group_facts",
    "multiprocessors",
    "numa_node_of",
    "nvlink_gap",
    "p2p_obstacle",
    "strategy_table",
    "topology_class",
    "view_of",
    "visible",
]
