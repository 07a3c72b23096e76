"""The group that `llm-allreduce explain` speaks of: here, on a recorded node, on hosts like it, or of CPU ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.host_costs import Network, inside_bytes_per_s
from llm_allreduce_plugin.cli.hosts import Hosts, Modelled, group_of
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.group.capabilities import cpu_facts, group_facts
from llm_allreduce_plugin.group.facts import ASSUMED_MULTIPROCESSORS
from llm_allreduce_plugin.group.layouts import peer_refusal, refusal_note
from llm_allreduce_plugin.group.multicast import group_outlook
from llm_allreduce_plugin.profiles.search import with_profile
from llm_allreduce_plugin.topology import NodeIdentity, NodeTopology, View, view_of
from llm_allreduce_plugin.topology.fabric import domain_notes
from llm_allreduce_plugin.topology.hosts import repeated
from llm_allreduce_plugin.topology.identity import topology_class
from llm_allreduce_plugin.topology.links import TopologyClass, Transport


@dataclasses.dataclass(frozen=True)
class Subject:
    """The group that is spoken of.

    Attributes:
        where: in words.
        facts: what its decisions depend on.
        notes: what a reader should know about them.
        inside: what joins GPUs of one host.
    """

    where: str
    facts: GroupFacts
    notes: tuple[str, ...] = ()
    inside: TopologyClass = TopologyClass.UNKNOWN


def subject(
    topology_file: Path | None,
    world_size: int | None,
    config: AllReduceConfig,
    *,
    cpu: bool,
    hosts: Hosts | None = None,
) -> Subject:
    """The group on a recorded node, on this node, or of CPU ranks where there are no GPUs.

    ``hosts``: instead on so many like it, joined by a network.

    Raises:
        TopologyError: the file cannot be read.
        ConfigError: ``tuning_profile`` names a file that cannot be used, or a setting does not fit the ranks.
        ValueError: the node has fewer GPUs than ``world_size``, this process sees none of them, or a file is given for
            CPU ranks.
    """
    if hosts is not None:
        ranks = hosts.number * hosts.ranks
        if world_size not in (None, ranks):
            message = f"--tp {world_size}: --hosts {hosts.number}x{hosts.ranks} are {ranks} ranks"
            raise ValueError(message)
        world_size = ranks
    if topology_file is not None:
        if cpu:
            message = "--cpu: not with --topology, which is a node with GPUs"
            raise ValueError(message)
        topology = NodeTopology.from_json(topology_file)
        return _of_gpus(topology, topology, topology_file.name, world_size, config, hosts)
    note: tuple[str, ...] = ()
    if not cpu:
        topology = NodeTopology.detect()
        view = view_of(topology)
        if view.hides_all:
            message = f"no GPU is visible: {view.hidden_text}: unset it, or give --cpu or --topology FILE"
            raise ValueError(message)
        if topology.gpus:
            found = _of_gpus(topology, view.topology, "this node", world_size, config, hosts)
            counting = _counting(view, found.facts.world_size if hosts is None else hosts.ranks)
            return dataclasses.replace(found, notes=(*found.notes, *counting))
        note = (f"no GPUs here ({topology.note}); --topology FILE speaks of another node",)
    return _of_cpus(world_size or 2, config, hosts, note)


def _of_cpus(ranks: int, config: AllReduceConfig, hosts: Hosts | None, note: tuple[str, ...]) -> Subject:
    config.check_world_size(ranks)
    number = 1 if hosts is None else hosts.number
    facts, ignored = with_profile(config, cpu_facts(ranks, config, number), NodeIdentity.of_cpu())
    return Subject(f"{ranks} CPU ranks{_on_hosts(number)}", facts, note + ignored)


def _of_gpus(
    node: NodeTopology,
    seen: NodeTopology,
    source: str,
    world_size: int | None,
    config: AllReduceConfig,
    hosts: Hosts | None,
) -> Subject:
    """``node``: all of it; ``seen``: what of it ranks may use."""
    no_domain = None
    if hosts is not None:
        if hosts.ranks > len(seen.gpus):
            message = f"--hosts {hosts.number}x{hosts.ranks}: {source} has {len(seen.gpus)} GPUs"
            raise ValueError(message)
        no_domain = "--hosts joins them by a network"
        seen = repeated(seen.subset(range(hosts.ranks)), hosts.number)
    refusal = peer_refusal()
    group = group_facts(seen, world_size, config, refusal, no_domain)
    config.check_world_size(group.world_size)
    facts, ignored = with_profile(config, group, NodeIdentity.of_gpus(node))
    members = seen.subset(range(facts.world_size))
    names = dict.fromkeys(gpu.name for gpu in members.gpus)
    where = f"{facts.world_size} x {' and '.join(names) or 'GPU'}{_on_hosts(members.hosts)} ({source})"
    note = tuple(filter(None, [refusal_note(config.transport, refusal)]))
    inside = topology_class(members, Transport.SYMMETRIC, range(facts.world_size))
    multicast = group_outlook(members, facts.world_size, facts.transport, inside)
    return Subject(where, facts, (*note, *_notes(members, facts), *filter(None, [multicast]), *ignored), inside)


def _on_hosts(number: int) -> str:
    return f" on {number} hosts" if number > 1 else ""


def modelled(found: Subject, hosts: str | None, network: Network | None, element_bytes: int) -> Modelled | None:
    """What messages should take between the hosts of a group. ``hosts``: as given; None without ``network``.

    Raises:
        ValueError: the ranks are not on several hosts that a network joins.
    """
    if network is None:
        return None
    facts, joined = found.facts, group_of(found.facts)
    if joined is None or facts.device != "cuda":
        what = "is for GPUs" if joined is not None else "is for ranks on several hosts that a network joins"
        message = f"--link {what}, and these are {found.where}{'' if hosts else ': give --hosts, too'}"
        raise ValueError(message)
    return Modelled(joined, network, inside_bytes_per_s(found.inside, facts.architecture), element_bytes)


def _counting(view: View, ranks: int) -> Iterator[str]:
    """Which GPUs the ranks are on, where that is not what one would think."""
    yield from view.notes
    members = view.positions[:ranks]
    if members != tuple(range(len(members))):
        names = ", ".join(map(view.node.name_of, members))
        yield f"ranks 0 to {len(members) - 1} are on {names}"


def _notes(members: NodeTopology, facts: GroupFacts) -> list[str]:
    notes = []
    if facts.transport is Transport.SYMMETRIC:
        if facts.multiprocessors is None:
            notes.append(
                f"the number of multiprocessors is not known: the launch is computed for {ASSUMED_MULTIPROCESSORS}"
            )
        notes.append(
            "peer access is what the driver says; a group proves it when it starts, as does llm-allreduce check"
        )
    elif facts.transport is Transport.HOST and (fault := members.p2p_fault()) is not None:
        notes.append(f"through host memory: {fault}")
    if facts.fabric:
        notes += domain_notes([gpu.fabric for gpu in members.gpus])
    elif facts.no_fabric_reason:
        notes.append(f"NVLink does not join the hosts: {facts.no_fabric_reason}")
    if len({gpu.architecture for gpu in members.gpus}) > 1:
        notes.append("the GPUs are of several architectures: a communicator refuses such a group")
    return notes
