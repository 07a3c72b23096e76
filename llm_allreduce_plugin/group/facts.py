"""The facts of a group: what its decisions depend on, from what its ranks say, what their node is, and the settings.

The engine, ``explain``, ``topo``, ``check`` and tests get them here. Pure, so that every rank has the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.group.cards import RankCard, domains, hosts_of, peer_refusal_of
from llm_allreduce_plugin.group.layouts import transport_obstacle, transports, workspace_layout
from llm_allreduce_plugin.topology.identity import positions_of, topology_class
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.topology.model import NodeTopology
from llm_allreduce_plugin.topology.node import p2p_fault_text

# An H100's or H200's, on which the launch shapes were measured: for GPUs of whose size a topology says nothing.
ASSUMED_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Reach:
    """How the ranks of a group reach each other.

    Attributes:
        facts: of the group.
        layout: of a rank's workspace; None: they share none.
        passed_over: why not through memory that would be better.
    """

    facts: GroupFacts
    layout: _C.Layout | None = None
    passed_over: tuple[str, ...] = ()


def gpus_of(cards: Sequence[RankCard]) -> NodeTopology:
    """The group's GPUs in rank order, as the first rank tells that knows all of them; empty where none does.

    What NVML says may differ from rank to rank: one may run in a container without it.
    """
    uuids = [card.gpu or "" for card in cards]
    for card in cards:
        if positions := positions_of(card.node, uuids):
            return card.node.subset(positions)
    return NodeTopology()


def facts_of(
    topology: NodeTopology,
    cards: Sequence[RankCard],
    settings: AllReduceConfig,
    failed: Mapping[Transport, str] | None = None,
) -> GroupFacts:
    """The facts of a group. They hold as long as the topology tells the truth; that bytes do arrive is proved later.

    Args:
        topology: the group's GPUs in rank order; empty where that is not known.
        cards: of its ranks, in rank order.
        settings: that ranks have in common.
        failed: ways to reach each other that were tried in vain, and why.
    """
    return reach_of(topology, cards, settings, failed).facts


def reach_of(
    topology: NodeTopology,
    cards: Sequence[RankCard],
    settings: AllReduceConfig,
    failed: Mapping[Transport, str] | None = None,
) -> Reach:
    """The same with the layout of workspaces, and what was passed over; see :func:`facts_of`."""
    device, size = cards[0].device, len(cards)
    members = range(len(topology.gpus))
    architectures = {card.architecture for card in cards}
    multiprocessors = min(card.multiprocessors for card in cards) or None
    facts = GroupFacts(
        world_size=size,
        device=device,
        transport=Transport.NONE,
        architecture=architectures.pop() if len(architectures) == 1 else None,
        multiprocessors=multiprocessors,
        hosts=hosts_of(cards),
        nvlink=not topology.nvlink_gap(members),
        domains=domains(cards),
    )
    if (obstacle := _obstacle(cards, settings)) is not None:
        return Reach(dataclasses.replace(facts, no_transport_reason=obstacle))
    faults = dict(failed or {})
    if (fault := p2p_fault(topology)) is not None:
        faults.setdefault(Transport.SYMMETRIC, fault)
    reasons: list[str] = []
    for transport in transports(settings, device, peer_refusal_of(cards)):
        if transport in faults:
            reasons.append(faults[transport])
            continue
        reached = dataclasses.replace(
            facts, transport=transport, topology_class=topology_class(topology, transport, members)
        )
        try:
            layout = workspace_layout(settings, reached, multiprocessors or ASSUMED_MULTIPROCESSORS)
        except ValueError as error:
            reasons.append(str(error))
            continue
        return Reach(reached.with_layout(transport, layout), layout, tuple(reasons))
    return Reach(dataclasses.replace(facts, no_transport_reason="; ".join(reasons)))


def _obstacle(cards: Sequence[RankCard], settings: AllReduceConfig) -> str | None:
    """Why not to try to share memory at all, or None."""
    hosts = hosts_of(cards)
    if (reason := transport_obstacle(settings, len(cards), hosts, cards[0].device)) is not None:
        return reason
    gpus = [(card.gpu, card.host) for card in cards if card.gpu is not None]
    return "several ranks share a GPU" if len(set(gpus)) < len(gpus) else None


def p2p_fault(topology: NodeTopology) -> str | None:
    """Why GPUs, which are those of a group in rank order, cannot use each other's memory, by the driver's word.

    None when they can, or nobody knows.
    """
    for a, row in enumerate(topology.p2p):
        for b, status in enumerate(row):
            if (fault := p2p_fault_text(f"the GPUs of ranks {a} and {b}", status)) is not None:
                return fault
    return None
