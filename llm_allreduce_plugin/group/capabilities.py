"""What a topology lets strategies do, without running anything: the facts of a group as its ranks would have them."""

from __future__ import annotations

import dataclasses

from llm_allreduce_plugin.algorithms.base import Message
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.strategies import STRATEGIES
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.group.cards import RankCard
from llm_allreduce_plugin.group.facts import facts_of
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.topology.model import NodeTopology
from llm_allreduce_plugin.transport.multicast_driver import switched_off_by


def group_facts(
    topology: NodeTopology,
    world_size: int | None = None,
    config: AllReduceConfig | None = None,
    refusal: str | None = None,
    no_domain: str | None = None,
) -> GroupFacts:
    """The facts of a group on the first ``world_size`` GPUs (default: all) of ``topology``.

    They are those that a communicator with ``config`` (default: no settings) agrees on there, as long as the topology
    tells the truth: that bytes do arrive is proved only where there are GPUs. ``refusal``: what
    :func:`~llm_allreduce_plugin.group.layouts.peer_refusal` says where they are to run. ``no_domain``: why they are in
    no NVLink domain over several hosts, whatever the topology says. What switches multicast off in this process counts.

    Raises:
        ValueError: there are fewer GPUs.
    """
    settings = config or AllReduceConfig()
    size = len(topology.gpus) if world_size is None else world_size
    if size > len(topology.gpus):
        message = f"world size {size}: the topology has {len(topology.gpus)} GPUs"
        raise ValueError(message)
    members = topology.subset(range(size))
    if not members.gpus:
        facts = GroupFacts(0, "cuda", Transport.NONE)
        return dataclasses.replace(facts, no_transport_reason=topology.note or "no GPU")
    cards = [
        dataclasses.replace(
            RankCard.of_rank(settings, "cuda"),
            architecture=gpu.architecture,
            host=str(gpu.host),
            gpu=gpu.uuid or None,
            gpu_name=gpu.name,
            multiprocessors=gpu.multiprocessors or 0,
            numa_node=gpu.numa_node,
            peer_refusal=refusal,
            domain_refusal=no_domain,
            multicast_switch=switched_off_by(),
            fabric=gpu.fabric,
        )
        for gpu in members.gpus
    ]
    return facts_of(members, cards, settings)


def cpu_facts(world_size: int, config: AllReduceConfig | None = None, hosts: int = 1) -> GroupFacts:
    """The facts of a group of CPU ranks, as many on each of ``hosts``."""
    settings = config or AllReduceConfig()
    card = RankCard.of_rank(settings, "cpu")
    names = [card.host] if hosts == 1 else [f"host {host}" for host in range(hosts)]
    each = world_size // len(names)
    cards = [dataclasses.replace(card, host=name) for name in names for _ in range(each)]
    return facts_of(NodeTopology(), cards, settings)


def strategy_table(facts: GroupFacts) -> list[tuple[AllReduceStrategy, str | None]]:
    """Every strategy with the reason why it cannot run on large 16-bit messages, or None when it can."""
    config = AllReduceConfig()
    message = Message(count=64 << 20, dtype="bfloat16", element_bytes=2)  # large: what pays is another question
    return [(name, strategy.obstacle(config, facts, message)) for name, strategy in STRATEGIES.items()]
