"""Staged calls: whether a two-shot moves in stages, and how it is spread. Kernels: csrc/device/staged_lane.cuh.

Where GPUs reach each other over PCIe, stores of all to all at once hold each other up in switches and host bridges. In
stages a GPU sends to one peer at a time and receives from one.
"""

from __future__ import annotations

import math

from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.algorithms.base import LINE_VECTORS, MAX_STAGED_THREADS, VECTOR_BYTES, Merit
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange, Launch
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.config import AllReduceConfig, StagedChoice
from llm_allreduce_plugin.topology.links import Transport

FEWEST_RANKS = 3


def obstacle(config: AllReduceConfig, facts: GroupFacts) -> str | None:
    """Why no call of this group can be staged, or None. Does not look at slots: a layout depends on the answer."""
    if config.staged is StagedChoice.OFF:
        return "staged is off"
    if facts.crosses_network:
        return f"stages are for ranks of one host, not of {facts.num_hosts}"
    if facts.transport is not Transport.SYMMETRIC:
        return f"stages are for ranks that store to each other's GPU memory, not for {facts.transport} memory"
    if facts.world_size < FEWEST_RANKS:
        return f"each of {facts.world_size} ranks has one stream out and one in anyway"
    return None


def pays(config: AllReduceConfig, facts: GroupFacts) -> Merit:
    """Whether a group that can should stage its large calls."""
    if config.staged is StagedChoice.AUTO and facts.nvlink:
        return Merit(pays=False, reason="NVLink seems to join the GPUs")
    return Merit(pays=True)


def refusal(config: AllReduceConfig, facts: GroupFacts) -> str | None:
    """Why no call of this group is staged, or None: it cannot be, or it does not pay."""
    if (reason := obstacle(config, facts)) is not None:
        return reason
    merit = pays(config, facts)
    return None if merit.pays else merit.reason


def message_pays(config: AllReduceConfig, stage_bytes: int) -> bool:
    """Whether a message should be staged of which a rank sends so many bytes to another."""
    return config.staged is not StagedChoice.AUTO or stage_bytes > measured.STAGED_ABOVE_STAGE_BYTES


def launch(
    config: AllReduceConfig,
    facts: GroupFacts,
    algorithm: Algorithm,
    units: int,
    *,
    unit_bytes: int = VECTOR_BYTES,
    unit_threads: int = 1,
) -> Launch | None:
    """How a staged call is spread; None when this message is not staged. Pure.

    Args:
        config: the settings.
        facts: of the group.
        algorithm: TWO_SHOT.
        units: in the message; vectors, or packets of a wire format.
        unit_bytes: of a unit in a slot.
        unit_threads: threads that handle a unit together.
    """
    if refusal(config, facts) is not None:
        return None
    part = max(1, math.ceil(units / facts.world_size))  # what a rank sends to another in a message of one round
    if not message_pays(config, part * unit_bytes):
        return None
    # All blocks meet at barriers of the grid, so all must run at once, as one to a multiprocessor does on any GPU.
    resident = min(facts.lanes, facts.multiprocessors or facts.lanes)
    lanes = min(measured.STAGED_LANES, resident, math.ceil(part * unit_threads / MAX_STAGED_THREADS))
    capacity = facts.flagged.staged // max(1, lanes) // unit_bytes
    if capacity < 1:
        return None
    # Pieces start on cache lines where a slot has room for one; packets are whole lines or nearly.
    line = LINE_VECTORS if unit_bytes == VECTOR_BYTES and capacity >= LINE_VECTORS else 1
    capacity -= capacity % line
    rounds = math.ceil(part / (lanes * capacity))
    chunk = math.ceil(math.ceil(part / (lanes * rounds)) / line) * line
    return Launch(
        algorithm,
        Exchange.STAGED,
        lanes=lanes,
        threads=MAX_STAGED_THREADS,
        chunk_vectors=chunk * unit_bytes // VECTOR_BYTES,
        rounds=math.ceil(part / (lanes * chunk)),
    )
