"""What a topology lets strategies do, without running anything."""

from __future__ import annotations

import dataclasses

from llm_allreduce_plugin.algorithms.base import Message
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.strategies import STRATEGIES
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.group.layouts import transport_obstacle, transports, workspace_layout
from llm_allreduce_plugin.topology.identity import topology_class
from llm_allreduce_plugin.topology.links import TopologyClass, Transport
from llm_allreduce_plugin.topology.model import NodeTopology, p2p_fault_text

# An H100's or H200's, on which the launch shapes were measured: for GPUs of whose size a topology says nothing.
ASSUMED_MULTIPROCESSORS = 132


def multiprocessors(topology: NodeTopology, world_size: int) -> int | None:
    """Of the smallest of the first ``world_size`` GPUs; None when one is not known."""
    counts = [gpu.multiprocessors for gpu in topology.gpus[:world_size]]
    known = [count for count in counts if count is not None]
    return min(known) if known and len(known) == len(counts) else None


def group_facts(
    topology: NodeTopology,
    world_size: int | None = None,
    config: AllReduceConfig | None = None,
    refusal: str | None = None,
) -> GroupFacts:
    """The facts of a group on the first ``world_size`` GPUs (default: all) of ``topology``.

    They are those that a communicator with ``config`` (default: no settings) agrees on there, as long as the topology
    tells the truth: that bytes do arrive is proved only where there are GPUs. ``refusal``: what
    :func:`~llm_allreduce_plugin.group.layouts.peer_refusal` says where they are to run.

    Raises:
        ValueError: there are fewer GPUs.
    """
    settings = config or AllReduceConfig()
    size = len(topology.gpus) if world_size is None else world_size
    if size > len(topology.gpus):
        message = f"world size {size}: the topology has {len(topology.gpus)} GPUs"
        raise ValueError(message)
    members = topology.gpus[:size]
    hosts = max(1, len({gpu.host for gpu in members}))
    architectures = {gpu.architecture for gpu in members}
    nodes = tuple(gpu.numa_node for gpu in members if gpu.numa_node is not None)
    facts = GroupFacts(
        world_size=size,
        device="cuda",
        transport=Transport.NONE,
        architecture=architectures.pop() if len(architectures) == 1 else None,
        multiprocessors=multiprocessors(topology, size),
        nodes=hosts,
        nvlink=not topology.nvlink_gap(range(size)),
        domains=nodes if len(nodes) == size else (),
    )
    if not members:
        return dataclasses.replace(facts, no_transport_reason=topology.note or "no GPU")
    if (obstacle := transport_obstacle(settings, size, hosts, "cuda")) is not None:
        return dataclasses.replace(facts, no_transport_reason=obstacle)
    reasons = []
    for transport in transports(settings, "cuda", refusal):
        if transport is Transport.SYMMETRIC and (fault := _p2p_fault(topology, size)) is not None:
            reasons.append(fault)
            continue
        try:
            smallest = multiprocessors(topology, size) or ASSUMED_MULTIPROCESSORS
            links = topology_class(topology, transport, range(size))
            reached = dataclasses.replace(facts, transport=transport, topology_class=links)
            return reached.with_layout(transport, workspace_layout(settings, reached, smallest))
        except ValueError as error:
            reasons.append(str(error))
    return dataclasses.replace(facts, no_transport_reason="; ".join(reasons))


def cpu_facts(world_size: int, config: AllReduceConfig | None = None) -> GroupFacts:
    """The facts of a group of CPU ranks."""
    settings = config or AllReduceConfig()
    facts = GroupFacts(
        world_size=world_size,
        device="cpu",
        transport=Transport.NONE,
    )
    if (obstacle := transport_obstacle(settings, world_size, 1, "cpu")) is not None:
        return dataclasses.replace(facts, no_transport_reason=obstacle)
    try:
        reached = dataclasses.replace(facts, transport=Transport.SHM, topology_class=TopologyClass.CPU)
        return reached.with_layout(Transport.SHM, workspace_layout(settings, reached, 0))
    except ValueError as error:
        return dataclasses.replace(facts, no_transport_reason=str(error))


def _p2p_fault(topology: NodeTopology, world_size: int) -> str | None:
    """The first pair of ranks without peer access, in the words of the communicator."""
    pairs = ((a, b) for a in range(world_size) for b in range(world_size) if a != b)
    faults = (p2p_fault_text(f"the GPUs of ranks {a} and {b}", topology.p2p[a][b]) for a, b in pairs)
    return next(filter(None, faults), None)


def strategy_table(facts: GroupFacts) -> list[tuple[AllReduceStrategy, str | None]]:
    """Every strategy with the reason why it cannot run on large 16-bit messages, or None when it can."""
    config = AllReduceConfig()
    message = Message(count=64 << 20, dtype="bfloat16", element_bytes=2)  # large: what pays is another question
    return [(name, strategy.obstacle(config, facts, message)) for name, strategy in STRATEGIES.items()]
