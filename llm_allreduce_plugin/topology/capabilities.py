"""What a topology lets strategies do, without running anything."""

from __future__ import annotations

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.selection.facts import GroupFacts, SlotBytes, Transport, hosts_obstacle
from llm_allreduce_plugin.strategies import STRATEGIES
from llm_allreduce_plugin.strategies.base import Message
from llm_allreduce_plugin.topology.identity import topology_class
from llm_allreduce_plugin.topology.model import NodeTopology

# The layout of the default workspace does not decide what can run; any slots will do here.
_SLOTS = SlotBytes(4096, 4096)


def group_facts(topology: NodeTopology, world_size: int | None = None) -> GroupFacts:
    """The facts of a group on the first ``world_size`` GPUs (default: all) of ``topology``.

    Raises:
        ValueError: there are fewer GPUs.
    """
    size = len(topology.gpus) if world_size is None else world_size
    if size > len(topology.gpus):
        message = f"world size {size}: the topology has {len(topology.gpus)} GPUs"
        raise ValueError(message)
    members = topology.gpus[:size]
    hosts = len({gpu.host for gpu in members})
    reason = ""
    transport = Transport.SYMMETRIC
    if not members:
        reason = topology.note or "no GPU"
    elif size == 1:
        reason = "one GPU has nobody to reduce with"
    else:
        reason = hosts_obstacle(hosts) or ""
        if topology.p2p_fault(range(size)) is not None:
            transport = Transport.HOST
    architectures = {gpu.architecture for gpu in members}
    return GroupFacts(
        world_size=size,
        device="cuda",
        transport=Transport.NONE if reason else transport,
        no_transport_reason=reason,
        lanes=_C.MAX_LANES,
        in_band=_SLOTS if transport is Transport.SYMMETRIC else SlotBytes(one_shot=4096),
        flagged=_SLOTS if transport is Transport.HOST else SlotBytes(),
        architecture=architectures.pop() if len(architectures) == 1 else None,
        nodes=max(hosts, 1),
        topology_class=topology_class(topology, Transport.NONE if reason else transport, range(size)),
    )


def strategy_table(facts: GroupFacts) -> list[tuple[AllReduceStrategy, str | None]]:
    """Every strategy with the reason why it cannot run on large 16-bit messages, or None when it can."""
    message = Message(count=64 << 20, dtype="bfloat16", element_bytes=2)  # large: what pays is another question
    return [(name, strategy.obstacle(facts, message)) for name, strategy in STRATEGIES.items()]
