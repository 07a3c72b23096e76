"""What a node's GPUs are and how they are linked, from NVML or from a JSON file."""

from llm_allreduce_plugin.topology.capabilities import group_facts, strategy_table
from llm_allreduce_plugin.topology.identity import NodeIdentity, fingerprint, topology_class
from llm_allreduce_plugin.topology.model import Fabric, Gpu, NodeTopology
from llm_allreduce_plugin.topology.nvml import detect, p2p_obstacle

__all__ = [
    "Fabric",
    "Gpu",
    "NodeIdentity",
    "NodeTopology",
    "detect",
    "fingerprint",
    "group_facts",
    "p2p_obstacle",
    "strategy_table",
    "topology_class",
]
