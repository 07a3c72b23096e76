"""What follows from a launch."""

from __future__ import annotations

from llm_allreduce_plugin.algorithms.decision import Launch


def owned_vectors(launch: Launch) -> int:
    """Vectors that one rank owns, after which come those of the next."""
    return launch.chunk_vectors if launch.in_band else launch.chunk_vectors * launch.lanes
