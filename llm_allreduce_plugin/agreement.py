"""What ranks must have in common before they may share a workspace."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.errors import RankMismatchError
from llm_allreduce_plugin.memory.layouts import peer_refusal
from llm_allreduce_plugin.topology import numa_node_of

_T = TypeVar("_T")

# Settings that only say where a rank writes.
_LOCAL_SETTINGS = {"report_dir"}


@dataclasses.dataclass(frozen=True)
class RankCard:
    """What one rank tells the others at start.

    ``settings``, ``plugin_version``, ``abi_version``, ``device`` and ``architecture`` must be equal on all ranks;
    ``host``, ``gpu`` and ``numa_node`` (None: not known) say where the rank runs, ``multiprocessors`` how large its GPU
    is, ``peer_refusal`` what in its environment keeps GPUs from each other's memory.
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
            host=_host_identity(),
            gpu=gpu,
            multiprocessors=multiprocessors,
            numa_node=None if gpu is None else numa_node_of(gpu),
            peer_refusal=refusal,
        )


def _host_identity() -> str:
    """Equal for processes that can share memory: one kernel (boot id) and one host name (container)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()}/{boot}"


def exchange(card: RankCard, group: dist.ProcessGroup) -> list[RankCard]:
    """Every rank's card, in rank order. Collective."""
    cards: list[RankCard | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(cards, card, group=group)
    return [received for received in cards if received is not None]


def first_fault(fault: str | None, group: dist.ProcessGroup) -> str | None:
    """The fault of the lowest rank that has one, on every rank alike. Collective.

    What only one rank can see must stop all of them: a rank that goes on alone waits for ever.
    """
    faults: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(faults, fault, group=group)
    return next(filter(None, faults), None)


def from_first_rank(make: Callable[[], _T], group: dist.ProcessGroup, raising: type[Exception]) -> _T:
    """``make()`` of the group's first rank, on every rank. Collective.

    Raises:
        raising: on every rank alike, with the text of what that rank raised.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            answer[0] = make()
        except Exception as error:  # noqa: BLE001  (whatever it is, the other ranks must hear of it)
            answer[1] = str(error) or type(error).__name__
    dist.broadcast_object_list(answer, src=dist.get_global_rank(group, 0), group=group)
    if answer[1] is not None:
        raise raising(answer[1])
    made: _T = answer[0]
    return made


def on_every_rank(make: Callable[[], _T], group: dist.ProcessGroup, raising: type[Exception], failed: str = "") -> _T:
    """``make()``, if it works on every rank. Collective.

    Raises:
        raising: on every rank alike, with ``failed`` and the first line of what the lowest failing rank raised.
    """
    made: list[_T] = []
    fault: str | None = None
    try:
        made.append(make())
    except Exception as error:  # noqa: BLE001  (whatever it is, the other ranks must hear of it)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fault = f"rank {dist.get_rank(group)} {failed}: {reason}" if failed else reason
    if (fault := first_fault(fault, group)) is not None:
        raise raising(fault)
    return made[0]


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
