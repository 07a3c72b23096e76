"""How fast the links of a group are beside those on which numbers were measured."""

from __future__ import annotations

from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.topology.links import TopologyClass


def link_scale(architecture: int | None, topology_class: TopologyClass) -> float:
    """What the links carry, of an H200's NVLinks. Unknown GPUs count as an H200; without NVLink, all are alike."""
    if topology_class is TopologyClass.PCIE_PEER:
        return measured.PCIE_SCALE
    return measured.LINK_SCALE.get(architecture or 90, 1.0)
