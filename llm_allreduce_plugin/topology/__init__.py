"""What a node's GPUs are and how they are linked, from NVML or from a JSON file."""

from llm_allreduce_plugin.topology.identity import NodeIdentity, fingerprint, topology_class
from llm_allreduce_plugin.topology.model import NodeTopology
from llm_allreduce_plugin.topology.node import Fabric, Gpu
from llm_allreduce_plugin.topology.visible import View, view_of, visible

__all__ = [
    "Fabric",
    "Gpu",
    "NodeIdentity",
    "NodeTopology",
    "View",
    "fingerprint",
    "topology_class",
    "view_of",
    "visible",
]
