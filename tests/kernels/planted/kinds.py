"""What a planted error is, and the groups of ranks whose calls show it; see ``stress`` in test_mutations.py."""

from __future__ import annotations

from typing import Any

from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.config import WireFormat

# What is wrong: the file, what stands there, what stands there instead when this error is made (`{}`: whether it is),
# and the groups whose calls must each show it.
Mutation = tuple[str, str, str, *tuple[dict[str, Any], ...]]

IN_BAND = {"workspace_mib": 0.25}
SPLIT = {"split": (1, 1), "lanes": 4, "workspace_mib": 0.5}
FLAGGED = {"in_band": False, "workspace_mib": 0.25}
HOST = {"host": True, "workspace_mib": 0.25}
STAGED = {"staged": True, "workspace_mib": 0.5}
RING = {
    "in_band": False,
    "lanes": 1,
    "threads": 32,
    "workspace_mib": 0.25,
    # Of up to four ranks none needs credit: nobody can be four hops ahead of the successor.
    "ranks": 8,
    "algorithm": "ring",
    "wire_format": WireFormat.TQ3,
}
TERNARY = {"in_band": False, "workspace_mib": 0.25, "low_precision": True, "wire_format": WireFormat.TQ3}
FP8 = {"split": (1, 1), "lanes": 4, "workspace_mib": 0.5, "low_precision": True}
UNSPLIT = {"unsplit": Algorithm.TWO_SHOT, "threads": 32, "workspace_mib": 0.5, "low_precision": True}
GROUPS = {"wire_format": WireFormat.FP8_GROUP, "workspace_mib": 0.5, "low_precision": True}
ONE_STEP = {"unsplit": Algorithm.ONE_SHOT, "workspace_mib": 0.5, "low_precision": True}
LARGE_HOST = {"large host": True}
LARGE_HOST_OF_THREE = {"large host, three ranks": True}
LARGE_HOST_IN_TWO_STEPS = {"large host, two steps": True}
LARGE_HOST_IN_TWO_STEPS_OF_THREE = {"large host, two steps, three ranks": True, "seeds": 2}
LARGE_HOST_IN_TWO_STEPS_OF_FIVE = {"large host, two steps, five ranks": True, "seeds": 2}
HOST_ROWS: dict[str, Any] = {"rows through host memory": True}
# More ranks than a block has workers, or a warp threads.
MANY = {"ranks": 34, "lanes": 1, "threads": 32, "workspace_mib": 1.5}
# Calls of every kind in one workspace, whose slots are the same bytes.
MIXED: dict[str, Any] = {"mixed": True}
REGISTRY: dict[str, Any] = {}
ROWS: dict[str, Any] = {"rows": True}
ROWS_OF_TWO: dict[str, Any] = {"rows of two ranks": True}
HOSTS: dict[str, Any] = {"hosts": True}
PLACES: dict[str, Any] = {"places": True}
PULLED_PLACES: dict[str, Any] = {"pulled": True}
HIERARCHICAL = {"in_band": False, "workspace_mib": 0.1, "algorithm": "hierarchical", "domains": (0, 0, 1, 1)}
MULTICAST: dict[str, Any] = {"multicast": True}
