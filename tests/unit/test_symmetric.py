"""Memory of a part of a group's ranks: what torch is told of them, and that it is forgotten again."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import HashStore

from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.transport import symmetric

NAME = "llm_allreduce/test/host/1"


@dataclasses.dataclass
class Handle:
    buffer_ptrs: list[int]


class Torch:
    """In place of torch's symmetric memory. ``has_table``: its ranks are known to it only by a table of its own."""

    def __init__(self, *, has_table: bool = False, fault: str = "") -> None:
        self._table: dict[str, Any] | None = {} if has_table else None
        self._fault = fault
        self.found: list[tuple[int, int]] = []

    def set_group_info(self, name: str, rank: int, size: int, store: Any) -> None:
        assert self._table is not None
        self._table[name] = rank, size, store

    def rendezvous(self, _buffer: torch.Tensor, name: str) -> Handle:
        if self._fault:
            raise RuntimeError(self._fault)
        if self._table is None:
            group = c10d._resolve_process_group(name)  # type: ignore[attr-defined]
            rank, size, store = group.rank(), group.size(), group.get_group_store()
        elif name not in self._table:
            message = f"get_group_info: no group info associated with the group name {name}"
            raise RuntimeError(message)
        else:
            rank, size, store = self._table[name]
        store.set(f"of {rank}", "here")
        self.found.append((rank, size))
        return Handle([16, 32])


def _rendezvous(monkeypatch: pytest.MonkeyPatch, fake: Torch, store: Any) -> tuple[object, list[int]]:
    monkeypatch.setattr(symmetric, "_SymmetricMemory", fake)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    # The group of all ranks is not asked for anything.
    return symmetric.among(store, 1, 2, NAME)(torch.empty(8), dist.group.WORLD)  # type: ignore[arg-type]


@pytest.mark.parametrize("has_table", (False, True), ids=("by name", "by a table"))
def test_torch_is_told_of_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch, has_table: bool) -> None:
    fake, store = Torch(has_table=has_table), HashStore()
    handle, bases = _rendezvous(monkeypatch, fake, store)
    assert fake.found == [(1, 2)]
    assert bases == [16, 32]
    assert isinstance(handle, Handle)
    assert store.get(f"{NAME}/of 1") == b"here", "keys of two hosts must not meet"
    with pytest.raises(RuntimeError):
        c10d._resolve_process_group(NAME)  # type: ignore[attr-defined]


def test_what_fails_leaves_no_group_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # a second try is refused for the same reason, not for a name that is taken
        with pytest.raises(RuntimeError, match="out of memory"):
            _rendezvous(monkeypatch, Torch(fault="CUDA driver error: out of memory"), HashStore())


class Alone(Agreement):
    """Of the one rank of a host: steps are taken by all hosts, which all do the same."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1

    def on_every_rank(self, make: Any, *_rest: Any, may_block: bool = False) -> Any:
        assert may_block
        return make()


def test_a_host_of_one_rank_maps_nothing() -> None:
    def rendezvous(*_: Any) -> Any:
        raise AssertionError

    prepared: list[torch.Tensor] = []
    buffer, handle, bases = symmetric.share(
        Alone(), dist.group.WORLD, torch.device("cpu"), 64, prepared.append,  # type: ignore[arg-type]
        allocate=lambda size, device: torch.zeros(size, dtype=torch.uint8, device=device), rendezvous=rendezvous,
    )  # fmt: skip
    assert bases == [buffer.data_ptr()]
    assert handle is None
    assert prepared[0] is buffer
