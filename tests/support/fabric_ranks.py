"""Ranks of one host as ranks of several, with what NVML says of their GPUs from a table."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol
from unittest import mock

import torch

from llm_allreduce_plugin.group.cards import RankCard
from llm_allreduce_plugin.topology.node import Fabric
from llm_allreduce_plugin.transport import fabric
from llm_allreduce_plugin.transport.driver import Driver, EntryPoints

ONE_DOMAIN = Fabric(
    state="completed", status="success", cluster_uuid="5f" * 16, clique_id=1, handles=True, imex_channel=True
)


class Ending(EntryPoints, Protocol):
    """Entry points that hand files out."""

    def end(self) -> None: ...


@contextlib.contextmanager
def fabric_of(entry_points: Ending) -> Iterator[list[torch.device]]:
    """Instead of the driver's. Whom it was asked for."""
    asked: list[torch.device] = []

    def open_driver(device: torch.device) -> Driver:
        asked.append(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return Driver(device.index or 0, entry_points)

    with mock.patch.object(fabric, "open_driver", open_driver):
        yield asked
    entry_points.end()


@contextlib.contextmanager
def placed(rank: int, hosts: Sequence[int], fabrics: Sequence[Fabric | None]) -> Iterator[None]:
    """Let this rank be on its host of ``hosts``, and NVML say its part of ``fabrics``."""
    original = RankCard.of_this_rank.__func__  # type: ignore[attr-defined]

    def of_this_rank(cls: type[RankCard], *arguments: Any) -> RankCard:
        return dataclasses.replace(original(cls, *arguments), host=f"host{hosts[rank]}", fabric=fabrics[rank])

    with mock.patch.object(RankCard, "of_this_rank", classmethod(of_this_rank)):
        yield
