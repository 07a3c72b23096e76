"""What ranks tell each other at the start, and what they must have in common before they may share a workspace."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.errors import RankMismatchError
from llm_allreduce_plugin.group.layouts import peer_refusal
from llm_allreduce_plugin.runtime.reports import new_member
from llm_allreduce_plugin.topology import numa_node_of

# Settings that only say where a rank writes.
_LOCAL_SETTINGS = {"report_dir"}


@dataclasses.dataclass(frozen=True)
class RankCard:
    """What one rank tells the others at start.

    ``settings``, ``plugin_version``, ``abi_version``, ``device`` and ``architecture`` must be equal on all ranks;
    ``host``, ``gpu`` and ``numa_node`` (None: not known) say where the rank runs, ``multiprocessors`` how large its GPU
    is, ``peer_refusal`` what in its environment keeps GPUs from each other's memory. ``member`` names this rank's part
    in the group, unlike any other's: the first rank's names the group in reports.
    """

    settings: dict[str, Any]
    plugin_version: str
    abi_version: int
    device: str
    architecture: int | None
    host: str
    gpu: str | None
    multiprocessors: int = 0
    numa_node: int | None = None
    peer_refusal: str | None = None
    member: str = dataclasses.field(default_factory=new_member)

    @classmethod
    def of_this_rank(cls, config: AllReduceConfig, device: torch.device) -> RankCard:
        """The card of the calling process."""
        architecture, gpu, multiprocessors, refusal = None, None, 0, None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            architecture, gpu = properties.major * 10 + properties.minor, str(properties.uuid)
            multiprocessors = properties.multi_processor_count
            refusal = peer_refusal()
        return cls(
            settings=config.model_dump(mode="json", exclude=_LOCAL_SETTINGS),
            plugin_version=__version__,
            abi_version=_C.abi_version(),
            device=device.type,
            architecture=architecture,
            host=host_identity(),
            gpu=gpu,
            multiprocessors=multiprocessors,
            numa_node=None if gpu is None else numa_node_of(gpu),
            peer_refusal=refusal,
        )


def host_identity(boot_id: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """Equal for processes on one kernel, whatever containers call themselves.

    Whether they can share memory is another question, which only sharing answers.
    """
    try:
        return boot_id.read_text().strip() or socket.gethostname()
    except OSError:
        return socket.gethostname()


def domains(cards: Sequence[RankCard]) -> tuple[int, ...]:
    """The NUMA node of each rank's GPU; empty when it is not known of all."""
    nodes = tuple(card.numa_node for card in cards if card.numa_node is not None)
    return nodes if len(nodes) == len(cards) else ()


def peer_refusal_of(cards: Sequence[RankCard]) -> str | None:
    """What keeps this group's GPUs from each other's memory: the variable, where one rank has it and others do not.

    One rank is enough, and all must decide alike: a rank that tries alone waits for the others.
    """
    found = [card.peer_refusal for card in cards]
    refusal = next(filter(None, found), None)
    if refusal is None or all(found):
        return refusal
    return f"{refusal} on rank {found.index(refusal)}"


def check(cards: Sequence[RankCard]) -> None:
    """Compare what must be equal.

    Raises:
        RankMismatchError: naming the field and the ranks behind each value.
    """
    for field in ("plugin_version", "abi_version", "device", "architecture"):
        _compare(field, [getattr(card, field) for card in cards])
    for setting in cards[0].settings:
        _compare(setting, [card.settings.get(setting) for card in cards])


def _compare(field: str, values: list[Any]) -> None:
    if all(value == values[0] for value in values):
        return
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(repr(value), []).append(rank)
    parts = [
        f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for value, ranks in holders.items()
    ]
    message = f"ranks disagree about {field}: {'; '.join(parts)}. Give every rank the same configuration and version"
    raise RankMismatchError(message)
