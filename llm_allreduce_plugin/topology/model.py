"""NodeTopology: a node, and where one may come from."""

from __future__ import annotations

from pathlib import Path

from llm_allreduce_plugin.topology import files, nvml
from llm_allreduce_plugin.topology.node import Node


class NodeTopology(Node):
    """A node as this process reads it: from NVML, or from a file that was recorded elsewhere."""

    @classmethod
    def _of(cls, node: Node) -> NodeTopology:
        values = {name: getattr(node, name) for name in type(node).model_fields}
        return cls.model_construct(**values)  # it is valid already

    @classmethod
    def parse(cls, path: Path, text: str) -> NodeTopology:
        """A topology from the text of a recorded one. ``path``: where it is from, for errors.

        Raises:
            TopologyError: naming the file and the field.
        """
        return cls._of(files.parse(path, text))

    @classmethod
    def from_json(cls, path: Path) -> NodeTopology:
        """Read a recorded topology.

        Raises:
            TopologyError: naming the file and the field.
        """
        return cls._of(files.read(path))

    @classmethod
    def detect(cls) -> NodeTopology:
        """This node, from NVML. Never raises: without NVML the result is empty and ``note`` says why."""
        return cls._of(nvml.detect())
