"""Multicast in a group: whether it is tried, how much memory it has, and what it would bring."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms import multicasting
from llm_allreduce_plugin.algorithms.facts import PAIR, GroupFacts, MulticastBytes
from llm_allreduce_plugin.config import AllReduceConfig, MulticastChoice
from llm_allreduce_plugin.topology.links import TopologyClass, Transport
from llm_allreduce_plugin.transport.multicast_driver import switched_off_by

if TYPE_CHECKING:
    from llm_allreduce_plugin.group.cards import RankCard
    from llm_allreduce_plugin.topology.model import NodeTopology

MULTICAST_BYTES = 64 << 20  # of each rank's memory; as much again for inputs that the switch sums
FIRST_ARCHITECTURE = 90


def layout_of(config: AllReduceConfig, world_size: int) -> _C.MulticastLayout:
    """Where things lie in the multicast memory of a group."""
    in_switch = multicasting.asks_for_sums_in_switch(config)
    return _C.make_multicast_layout(world_size, MULTICAST_BYTES * (2 if in_switch else 1), in_switch=in_switch)


def refusal(
    choice: MulticastChoice,
    world_size: int,
    supported: Sequence[bool | None],
    switched_off: str | None,
    other: str | None = None,
) -> str | None:
    """Why multicast is not even tried, or None. Pure.

    Args:
        choice: what is asked for.
        world_size: ranks of the group.
        supported: what NVML or the driver say of each GPU; None: they say nothing.
        switched_off: of any rank, see :func:`~llm_allreduce_plugin.transport.multicast_driver.switched_off_by`.
        other: what else stands against it: a strategy that never goes by it, memory that is not
            peers' GPU memory, several hosts.
    """
    if choice is MulticastChoice.OFF:
        return "multicast is off"
    if switched_off is not None:
        return f"multicast is switched off by {switched_off}"
    if other is not None:
        return other
    if False in supported:
        return f"the GPU of rank {list(supported).index(False)} has no multicast"
    if choice is MulticastChoice.AUTO and world_size == PAIR:
        return "between two ranks one store reaches one peer, with multicast or without"
    return None


def outlook(supported: Sequence[bool | None], switched_off: str | None, ranks: int) -> str:
    """What multicast would bring to ``ranks`` GPUs of a node, for people. Pure; other arguments: :func:`refusal`."""
    if not supported or not all(supported):
        without = [str(index) for index, has in enumerate(supported) if has is False]
        return f"GPU {', '.join(without)} has none" if without else "not known of all GPUs"
    off = f"switched off by {switched_off}" if switched_off else "off unless asked for (setting multicast)"
    if ranks <= PAIR:
        return f"all GPUs have it; {off}; nothing to win over two GPUs"
    push, summed = 2 * (ranks - 1) / ranks, 1 + 1 / ranks
    of = "bytes for each byte of a large message"
    # One store of the own part for all, and a read of it from all: with three as much as two pushed steps.
    in_switch = f"{summed:.2f} {of}, not {push:.2f}" if summed < push else f"as much over three GPUs, {push:.2f} {of}"
    return (
        f"all GPUs have it; {off}. ONESHOT and TWOSHOT would store once instead of {ranks - 1} times what is for all, "
        f"with the same bits; with in_switch_sum a GPU would send {in_switch}. Neither has run on hardware yet"
    )


def node_outlook(topology: NodeTopology, ranks: int, environment: Mapping[str, str] | None = None) -> str:
    """:func:`outlook` for ``ranks`` GPUs of a host like this one, by the switches of this process.

    ``environment``: instead of this process's.
    """
    return outlook([gpu.multicast for gpu in topology.gpus], switched_off_by(environment), ranks)


def group_outlook(topology: NodeTopology, ranks: int, transport: Transport, joined: TopologyClass) -> str:
    """The line that commands print about a group; empty where no NVSwitch is between its GPUs' memory.

    Args:
        topology: the node.
        ranks: GPUs of the group, all of that node.
        transport: how they reach each other.
        joined: what their bytes travel over.
    """
    if transport is not Transport.SYMMETRIC or joined is not TopologyClass.NVSWITCH or topology.hosts > 1:
        return ""
    return f"multicast: {node_outlook(topology, ranks)}"


def _other_obstacle(config: AllReduceConfig, facts: GroupFacts) -> str | None:
    if (reason := multicasting.obstacle(config)) is not None:
        return reason
    if facts.device != "cuda" or facts.transport is not Transport.SYMMETRIC:
        return "multicast is of GPU memory that ranks share"
    if facts.num_hosts > 1:
        return f"ranks run on {facts.num_hosts} hosts, and multicast here is of one"
    if facts.architecture is not None and facts.architecture < FIRST_ARCHITECTURE:
        return f"switches of sm_{facts.architecture} have no multicast; those of sm_{FIRST_ARCHITECTURE} and newer may"
    return None if config.in_band else "in_band is off, and multicast is in band"


def with_multicast(
    config: AllReduceConfig, facts: GroupFacts, topology: NodeTopology, cards: Sequence[RankCard]
) -> GroupFacts:
    """The facts with the multicast memory that a group has if nothing fails, or why it has none. Pure."""
    switches = [card.multicast_switch for card in cards]
    switch = next(filter(None, switches), None)
    if switch is not None and not all(switches):
        switch = f"{switch} on rank {switches.index(switch)}"
    supported = [gpu.multicast for gpu in topology.gpus]
    why_not = refusal(config.multicast, facts.world_size, supported, switch, _other_obstacle(config, facts))
    if why_not is not None:
        return facts.without_multicast(why_not)
    layout = layout_of(config, facts.world_size)
    held = MulticastBytes(layout.one_shot_bytes, layout.results_bytes, layout.inputs_bytes)
    return dataclasses.replace(facts, multicast=held, no_multicast_reason="")
