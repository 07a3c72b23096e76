"""What ranks tell each other at the start, and what they must have in common before they may share a workspace."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_allreduce_plugin import _C
from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.base.members import new_member
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.errors import RankMismatchError, ranks_text, ranks_with
from llm_allreduce_plugin.group.layouts import peer_refusal
from llm_allreduce_plugin.topology.identity import positions_of
from llm_allreduce_plugin.topology.model import NodeTopology
from llm_allreduce_plugin.topology.node import Fabric
from llm_allreduce_plugin.transport.multicast_driver import switched_off_by

if TYPE_CHECKING:
    import torch

# Settings that only say where a rank writes.
_LOCAL_SETTINGS = {"report_dir"}


@dataclasses.dataclass(frozen=True)
class RankCard:
    """What one rank tells the others at start.

    ``settings``, ``plugin_version``, ``abi_version`` and ``device`` must be equal on all ranks; where ``architecture``
    differs, ranks share no memory.
    ``host``, ``gpu`` and ``numa_node`` (None: not known) say where the rank runs, ``gpu_name`` what its GPU is called,
    ``multiprocessors`` how large it is, ``peer_refusal`` what in its environment keeps GPUs from each other's memory,
    ``domain_refusal`` the same across hosts, ``multicast_switch`` what switches multicast off there, ``fabric`` in
    which NVLink domain its GPU is. ``node`` is what NVML says of the node, empty where it says nothing. ``member``
    names this rank's part in the group, unlike any other's: the first rank's names the group in reports.
    """

    settings: dict[str, Any]
    plugin_version: str
    abi_version: int
    device: str
    architecture: int | None
    host: str
    gpu: str | None
    gpu_name: str = ""
    multiprocessors: int = 0
    numa_node: int | None = None
    peer_refusal: str | None = None
    domain_refusal: str | None = None
    multicast_switch: str | None = None
    fabric: Fabric | None = None
    node: NodeTopology = dataclasses.field(default_factory=NodeTopology)
    member: str = dataclasses.field(default_factory=new_member)

    @classmethod
    def of_rank(cls, config: AllReduceConfig, device: str) -> RankCard:
        """What the card of any rank says that runs on this host with these settings. ``device``: its type."""
        return cls(
            settings=config.model_dump(mode="json", exclude=_LOCAL_SETTINGS),
            plugin_version=__version__,
            abi_version=_C.abi_version(),
            device=device,
            architecture=None,
            host=host_identity(),
            gpu=None,
        )

    @classmethod
    def of_this_rank(cls, config: AllReduceConfig, device: torch.device, node: NodeTopology | None = None) -> RankCard:
        """The card of the calling process. ``node``: what NVML says, if it was asked."""
        card = cls.of_rank(config, device.type)
        if device.type != "cuda":
            return card
        import torch  # explain and topo do without

        properties, node = torch.cuda.get_device_properties(device), node or NodeTopology()
        gpu = str(properties.uuid)
        positions = positions_of(node, [gpu])
        own = node.gpus[positions[0]] if positions else None
        return dataclasses.replace(
            card,
            architecture=properties.major * 10 + properties.minor,
            gpu=gpu,
            gpu_name=properties.name,
            multiprocessors=properties.multi_processor_count,
            numa_node=own.numa_node if own else None,
            peer_refusal=peer_refusal(),
            domain_refusal=domain_refusal(),
            multicast_switch=switched_off_by(),
            fabric=own.fabric if own else None,
            node=node,
        )


def host_identity(boot_id: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """Equal for processes on one kernel, whatever containers call themselves.

    ``NCCL_HOSTID``, where it is set, is what NCCL tells hosts apart by, and so it is here. Whether processes can share
    memory is another question, which only sharing answers.
    """
    if host := os.environ.get("NCCL_HOSTID", "").strip():
        return host
    try:
        return boot_id.read_text().strip() or socket.gethostname()
    except OSError:
        return socket.gethostname()


def domain_refusal(environment: Mapping[str, str] | None = None) -> str | None:
    """The variable by which a user keeps NVLink between hosts from being used, as it is set, or None.

    NCCL's: whoever found the domain broken has set it for NCCL. ``environment``: instead of this process's.
    """
    variables = os.environ if environment is None else environment
    return "NCCL_MNNVL_ENABLE=0" if variables.get("NCCL_MNNVL_ENABLE", "").strip() == "0" else None


def hosts_of(cards: Sequence[RankCard]) -> tuple[int, ...]:
    """The host of each rank, numbered as ranks first name them."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(card.host, len(numbers)) for card in cards)


def domains(cards: Sequence[RankCard]) -> tuple[int, ...]:
    """The NUMA node of each rank's GPU; empty when it is not known of all.

    Over several hosts they are numbered as ranks first name them: each host counts its own.
    """
    nodes = tuple(card.numa_node for card in cards if card.numa_node is not None)
    if len(nodes) != len(cards):
        return ()
    if len({card.host for card in cards}) == 1:
        return nodes
    numbers: dict[tuple[str, int], int] = {}
    return tuple(numbers.setdefault((card.host, node), len(numbers)) for card, node in zip(cards, nodes, strict=True))


def peer_refusal_of(cards: Sequence[RankCard]) -> str | None:
    """What keeps this group's GPUs from each other's memory: the variable, where one rank has it and others do not.

    One rank is enough, and all must decide alike: a rank that tries alone waits for the others.
    """
    found = [card.peer_refusal for card in cards]
    refusal = next(filter(None, found), None)
    if refusal is None or all(found):
        return refusal
    return f"{refusal} on rank {found.index(refusal)}"


def architectures_obstacle(cards: Sequence[RankCard]) -> str | None:
    """Why kernels of this package do not run on these ranks' GPUs together, or None: one launch must fit all of them.

    The engine's own all-reduce does run.
    """
    found = ranks_with(f"sm_{card.architecture}" for card in cards)
    if len(found) == 1:
        return None
    parts = [f"{name} on {ranks_text(ranks)}" for name, ranks in found.items()]
    told = ", ".join(parts)
    return f"kernels are launched alike on every GPU of a group, and these are of several architectures: {told}"


def check(cards: Sequence[RankCard]) -> None:
    """Compare what must be equal.

    Raises:
        RankMismatchError: naming the field and the ranks behind each value.
    """
    for field in ("plugin_version", "abi_version", "device"):
        _compare(field, [getattr(card, field) for card in cards])
    for setting in cards[0].settings:
        _compare(setting, [card.settings.get(setting) for card in cards])


def _compare(field: str, values: list[Any]) -> None:
    if all(value == values[0] for value in values):
        return
    parts = [f"{value} on {ranks_text(ranks)}" for value, ranks in ranks_with(map(repr, values)).items()]
    message = f"ranks disagree about {field}: {'; '.join(parts)}. Give every rank the same configuration and version"
    raise RankMismatchError(message)
