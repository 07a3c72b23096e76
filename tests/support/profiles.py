"""Tuning profiles for tests: the numbers in them are made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.profiles.entry import Entry
from llm_allreduce_plugin.topology import NodeIdentity
from llm_allreduce_plugin.topology.links import TopologyClass, Transport

Ranges = Sequence[tuple[int | None, str]]
CHANGING: Ranges = [
    (1024, "ONESHOT"),
    (3000, "TWOSHOT"),
    (8192, "ONESHOT"),
    (40_000, "TWOSHOT"),
    (70_000, "ONESHOT"),
    (None, "TWOSHOT"),
]


def node(name: str) -> NodeIdentity:
    return NodeIdentity("cuda", name, 90, "0123456789abcdef", f"4 x {name}")


def fused(graph: Ranges = ((1 << 20, "fused"), (None, "then-norm")), eager: Ranges | None = None) -> dict[str, Any]:
    """What an entry may say of sums with a norm behind them."""

    def ranges(given: Ranges) -> list[dict[str, Any]]:
        return [{"max_bytes": limit, "runs": runs} for limit, runs in given]

    times = {"fused": 3.0, "then-norm": 4.0}
    return {
        "hidden": 8192,
        "graph": ranges(graph),
        "eager": ranges(graph if eager is None else eager),
        "measured": [{"bytes": 16384, "strategy": "ONESHOT", "graph_us": times, "eager_us": times}],
    }


def registered(graph: Ranges, eager: Ranges | None = None) -> dict[str, Any]:
    """What an entry may say of registered outputs."""

    def ranges(given: Ranges) -> list[dict[str, Any]]:
        return [{"max_bytes": limit, "strategy": strategy} for limit, strategy in given]

    return {"graph": ranges(graph), "eager": ranges(graph if eager is None else eager)}


def entry(graph: Any = ((None, "ONESHOT"),), eager: Any = ((None, "TWOSHOT"),), **fields: Any) -> Entry:
    """An entry for 4 ranks over NVSwitch, in band, unless ``fields`` say otherwise."""

    def ranges(given: Any) -> list[dict[str, Any]]:
        return [found if isinstance(found, dict) else {"max_bytes": found[0], "strategy": found[1]} for found in given]

    values: dict[str, Any] = {
        "world_size": 4,
        "transport": Transport.SYMMETRIC,
        "topology_class": TopologyClass.NVSWITCH,
        "in_band": True,
        "element_bytes": 2,
        "dtype": "bfloat16",
        "date": "2025-01-02T03:04:05+00:00",
        "method": "made up",
        "environment": {"llm_allreduce_plugin": __version__},
        "measured": [{"bytes": 4096, "graph_us": {"ONESHOT": 1.0, "TWOSHOT": 2.0}, "eager_us": {"ONESHOT": 3.0}}],
    }
    return Entry.model_validate(values | {"graph": ranges(graph), "eager": ranges(eager)} | fields)


def cpu_entry(world_size: int, **fields: Any) -> Entry:
    """An entry for CPU ranks."""
    of_cpu = {"transport": Transport.SHM, "topology_class": TopologyClass.CPU, "in_band": False}
    return entry(world_size=world_size, **of_cpu, **fields)
