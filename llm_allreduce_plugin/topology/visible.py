"""The part of a node that this process may use."""

from __future__ import annotations

import os
from collections.abc import Mapping

from llm_allreduce_plugin.topology.model import NodeTopology

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible(topology: NodeTopology, environment: Mapping[str, str] = os.environ) -> NodeTopology:
    """``topology`` without the GPUs that ``CUDA_VISIBLE_DEVICES`` hides, in its order.

    As the driver reads it: numbers or beginnings of UUIDs, up to the first that names no GPU. Numbers count in
    NVML's order, which is the driver's too where all GPUs are alike.
    """
    text = environment.get(VARIABLE)
    if text is None or not topology.gpus:
        return topology
    positions: list[int] = []
    for word in text.split(","):
        position = _position(topology, word.strip())
        if position is None or position in positions:
            break
        positions.append(position)
    note = topology.note if positions else f"{VARIABLE}={text!r} hides every GPU"
    return topology.subset(positions).model_copy(update={"note": note})


def _position(topology: NodeTopology, word: str) -> int | None:
    if word.isdecimal():
        return int(word) if int(word) < len(topology.gpus) else None
    found = [position for position, gpu in enumerate(topology.gpus) if word and gpu.uuid.startswith(word)]
    return found[0] if len(found) == 1 else None
