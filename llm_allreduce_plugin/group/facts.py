"""The facts of a group: what its decisions depend on, from what its ranks say, what their node is, and the settings.

The engine, ``explain``, ``topo``, ``check`` and tests get them here. Pure, so that every rank has the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.facts import GroupFacts, hosts_obstacle
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.group.cards import RankCard, architectures_obstacle, domains, hosts_of, peer_refusal_of
from llm_allreduce_plugin.group.layouts import transport_obstacle, transports, workspace_layout
from llm_allreduce_plugin.group.multicast import with_multicast
from llm_allreduce_plugin.topology.fabric import domain_obstacle
from llm_allreduce_plugin.topology.hosts import joined
from llm_allreduce_plugin.topology.identity import positions_of, topology_class
from llm_allreduce_plugin.topology.links import TopologyClass, Transport
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


def gpus_of(cards: Sequence[RankCard], no_domain: str | None = None) -> NodeTopology:
    """The group's GPUs in rank order, as the first rank tells that knows all of them; empty where none does.

    What NVML says may differ from rank to rank: one may run in a container without it. Of several hosts each must be
    known to one of its own ranks; ``no_domain``: why NVLink does not join them, whatever cards say.
    """
    hosts = hosts_of(cards)
    members = [[card for card, of in zip(cards, hosts, strict=True) if of == host] for host in sorted(set(hosts))]
    parts = [_gpus_of_host(found) for found in members]
    if len(parts) == 1:
        return parts[0]
    if not all(part.gpus for part in parts):
        return NodeTopology()
    # Host after host, and from there in rank order: ranks of a host need not follow each other.
    whole = joined(parts, domain=(no_domain or domain_fault(cards)) is None)
    order = sorted(range(len(cards)), key=lambda rank: hosts[rank])
    return whole.subset([order.index(rank) for rank in range(len(cards))])


def _gpus_of_host(cards: Sequence[RankCard]) -> NodeTopology:
    uuids = [card.gpu or "" for card in cards]
    for card in cards:
        if positions := positions_of(card.node, uuids):
            return card.node.subset(positions)
    return NodeTopology()


def domain_fault(cards: Sequence[RankCard]) -> str | None:
    """Why ranks are not in one NVLink domain over several hosts, by what their cards say; None: they are, or on one."""
    if len(set(hosts_of(cards))) <= 1:
        return None
    if cards[0].device == "cpu" and not any(card.fabric for card in cards):
        return "CPU ranks have no NVLink"
    refusals = [card.domain_refusal for card in cards]
    if (refusal := next(filter(None, refusals), None)) is not None:
        return refusal if all(refusals) else f"{refusal} on rank {refusals.index(refusal)}"
    return domain_obstacle([card.fabric for card in cards])


def facts_of(
    topology: NodeTopology,
    cards: Sequence[RankCard],
    settings: AllReduceConfig,
    failed: Mapping[Transport, str] | None = None,
    no_domain: str | None = None,
) -> GroupFacts:
    """The facts of a group. They hold as long as the topology tells the truth; that bytes do arrive is proved later.

    Args:
        topology: the group's GPUs in rank order; empty where that is not known.
        cards: of its ranks, in rank order.
        settings: that ranks have in common.
        failed: ways to reach each other that were tried in vain, and why.
        no_domain: why an NVLink domain over several hosts that the cards speak of cannot be used after all.
    """
    return reach_of(topology, cards, settings, failed, no_domain).facts


def reach_of(
    topology: NodeTopology,
    cards: Sequence[RankCard],
    settings: AllReduceConfig,
    failed: Mapping[Transport, str] | None = None,
    no_domain: str | None = None,
) -> Reach:
    """The same with the layout of workspaces, and what was passed over; see :func:`facts_of`."""
    device, size = cards[0].device, len(cards)
    members = range(len(topology.gpus))
    architectures = {card.architecture for card in cards}
    gpu_names = {card.gpu_name for card in cards}
    multiprocessors = min(card.multiprocessors for card in cards) or None
    hosts = hosts_of(cards)
    spread = len(set(hosts)) > 1
    refusal = peer_refusal_of(cards)
    ways = transports(settings, device, refusal)
    if spread and ways == (Transport.HOST,):
        no_domain = (
            no_domain or f"{refusal or 'transport host'} makes ranks use host memory, which other hosts cannot reach"
        )
    no_domain = (domain_fault(cards) or no_domain) if spread else None
    facts = GroupFacts(
        world_size=size,
        device=device,
        transport=Transport.NONE,
        architecture=architectures.pop() if len(architectures) == 1 else None,
        gpu_name=gpu_names.pop() if len(gpu_names) == 1 else "",
        multiprocessors=multiprocessors,
        hosts=hosts,
        fabric=spread and no_domain is None,
        no_fabric_reason=no_domain or "",
        nvlink=not topology.nvlink_gap(members),
        domains=domains(cards),
    )
    if (obstacle := _obstacle(cards, settings, facts)) is not None:
        return Reach(dataclasses.replace(facts, no_transport_reason=obstacle))
    faults = dict(failed or {})
    if (fault := p2p_fault(topology)) is not None:
        faults.setdefault(Transport.SYMMETRIC, fault)
    reasons: list[str] = []
    for transport in ways:
        if transport in faults:
            reasons.append(faults[transport])
            continue
        if facts.fabric and transport is Transport.HOST:
            reasons.append("host memory is of one host")
            continue
        # GPUs of several hosts meet in switches, whatever one host's NVML says of their links.
        spans = facts.fabric and transport is Transport.SYMMETRIC
        kind = TopologyClass.NVSWITCH if spans else topology_class(topology, transport, members)
        reached = dataclasses.replace(facts, transport=transport, topology_class=kind)
        try:
            layout = workspace_layout(settings, reached, multiprocessors or ASSUMED_MULTIPROCESSORS)
        except ValueError as error:
            reasons.append(str(error))
            continue
        reached = with_multicast(settings, reached.with_layout(transport, layout), topology, cards)
        return Reach(reached, layout, tuple(reasons))
    return Reach(dataclasses.replace(facts, no_transport_reason="; ".join(reasons)))


def _obstacle(cards: Sequence[RankCard], settings: AllReduceConfig, facts: GroupFacts) -> str | None:
    """Why not to try to share memory at all, or None."""
    hosts = () if facts.fabric else facts.hosts
    if (reason := transport_obstacle(settings, len(cards), hosts, cards[0].device)) is not None:
        of_hosts = facts.no_fabric_reason and reason == hosts_obstacle(hosts)
        return f"{reason}; no NVLink domain joins them: {facts.no_fabric_reason}" if of_hosts else reason
    if (reason := architectures_obstacle(cards)) is not None:
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
