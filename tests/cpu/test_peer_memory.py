"""Memory that ranks of one host send each other as files: opened, written by every peer, and let go of.

The driver is :mod:`tests.support.fake_fabric`, and memory files of this machine; the code in between is real.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.group.host_agreement import HostAgreement
from llm_allreduce_plugin.group.places import Places
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport import mapped, peer, symmetric
from llm_allreduce_plugin.transport.driver import FILE_DESCRIPTOR, Driver
from llm_allreduce_plugin.transport.passing import ThroughSocket
from llm_allreduce_plugin.transport.peer_visible import PeerVisibleBuffer
from llm_allreduce_plugin.transport.registered import RegisteredPool
from llm_allreduce_plugin.transport.symmetric import SymmetricMemory
from tests.support.fake_fabric import UNKNOWN, FakeEntryPoints, Truth
from tests.support.forked import forked, wait_until

RANKS = 3
SIZE = 100_000
CPU = torch.device("cpu")
WAIT_S = 1.5
# Every call, and the how-manieth of its name: those of a rank's own memory, and of its peers'.
CALLS = (
    ("cuInit", 1),
    ("cuDevicePrimaryCtxRetain", 1),
    ("cuMemGetAllocationGranularity", 1),
    ("cuMemCreate", 1),
    ("cuMemAddressReserve", 1),
    ("cuMemMap", 1),
    ("cuMemSetAccess", 1),
    ("cuMemExportToShareableHandle", 1),
    ("cuMemImportFromShareableHandle", 1),
    ("cuMemImportFromShareableHandle", 2),
    ("cuMemMap", 2),
    ("cuMemSetAccess", 3),
)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """``call``, ``count``, ``rank``: that call of that rank returns an error, or with ``hangs`` does not return.

    ``deaf``: this rank gets no file through a socket.
    """

    rank: int = -1
    call: str = ""
    count: int = 1
    hangs: bool = False
    deaf: int = -1

    def entry_points(self, rank: int) -> FakeEntryPoints:
        """Of a rank whose GPU is in no NVLink domain."""
        seen = 0

        def misbehave(name: str) -> int:
            nonlocal seen
            seen += name == self.call
            if rank != self.rank or name != self.call or seen != self.count:
                return 0
            if self.hangs:
                threading.Event().wait()
            return UNKNOWN

        return FakeEntryPoints(Truth(None, handles=False), misbehave)


@contextlib.contextmanager
def _driver(entry_points: FakeEntryPoints, *, deaf: bool = False) -> Iterator[None]:
    def fetch(_self: ThroughSocket, _where: str, _token: bytes) -> int:
        raise ConnectionRefusedError(111, "Connection refused")

    silence = mock.patch.object(ThroughSocket, "fetch", fetch) if deaf else contextlib.nullcontext()

    def open_driver(_device: torch.device) -> Driver:
        return Driver(0, entry_points, FILE_DESCRIPTOR)

    opened = mock.patch.object(peer, "open_driver", open_driver)
    with opened, silence, mock.patch.object(mapped, "CLOSE_WAIT_S", WAIT_S):
        yield


def _files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _passing() -> int:
    return sum(thread.name == "llm-allreduce-passing" for thread in threading.enumerate())


def _written_by_all(agreement: Agreement, rank: int) -> str | None:
    """Share, let every rank write a byte to each, and look; why it was not to be, or None."""

    def prepare(_driver: Driver, address: int) -> None:
        mapped.bytes_at(address, SIZE, CPU).zero_()

    try:
        memory = mapped.share(agreement, CPU, SIZE, prepare, peer.FileHandles())
    except TransportError as error:
        return str(error)
    for owner, base in enumerate(memory.bases):
        mapped.bytes_at(base, SIZE, CPU)[rank] = 10 * rank + owner + 1
    agreement.barrier("to have written")
    own = mapped.bytes_at(memory.bases[rank], SIZE, CPU)
    seen, rest = own[:RANKS].tolist(), int(own[RANKS:].sum())
    agreement.barrier("to have looked")
    memory.close()
    assert (seen, rest) == ([10 * writer + rank + 1 for writer in range(RANKS)], 0)
    return None


def shares(
    context: RankContext, scenarios: list[Scenario], wait_s: float
) -> list[tuple[str | None, float, dict[str, int]]]:
    """On a rank: why not, seconds, and what is left of each; ``driver`` -1: it hangs there."""
    found = []
    outer = Agreement(context.group, 30.0)
    for scenario in scenarios:
        entry_points = scenario.entry_points(context.rank)
        files = _files()
        inner = outer.nested(wait_s, "a limit", "in a test")
        outer.barrier("to begin together")
        began = time.monotonic()
        with _driver(entry_points, deaf=scenario.deaf == context.rank):
            fault = _written_by_all(inner, context.rank)
        seconds = time.monotonic() - began
        inner.close()
        hangs = scenario.hangs and context.rank == scenario.rank

        def left(entry_points: FakeEntryPoints = entry_points, files: int = files) -> dict[str, int]:
            return {"driver": sum(entry_points.left().values()), "files": _files() - files, "threads": _passing()}

        wait_until(lambda: hangs or not any(left().values()))  # noqa: B023  (asked at once)
        found.append((fault, seconds, {"driver": -1} if hangs else left()))
        outer.barrier("to end together")
    outer.close()
    return found


def answers(scenarios: list[Scenario], wait_s: float = 20.0) -> list[list[tuple[str | None, float, dict[str, int]]]]:
    """Of each scenario, of every rank."""
    with forked(RANKS, shares, scenarios, wait_s) as group:
        found = [group.value(rank, 100) for rank in range(RANKS)]
    return [list(of) for of in zip(*found, strict=True)]


NOTHING = {"driver": 0, "files": 0, "threads": 0}


def test_every_rank_writes_to_every_rank_s_memory() -> None:
    for of_ranks in answers([Scenario()] * 3):
        assert [(fault, left) for fault, _, left in of_ranks] == [(None, NOTHING)] * RANKS


def test_an_error_of_any_call_on_any_rank_stops_all_alike() -> None:
    scenarios = [Scenario(rank=rank, call=call, count=count) for call, count in CALLS for rank in range(RANKS)]
    for scenario, of_ranks in zip(scenarios, answers(scenarios), strict=True):
        faults = {fault for fault, *_ in of_ranks}
        assert len(faults) == 1, (scenario, of_ranks)
        assert f"rank {scenario.rank} cannot" in str(faults), (scenario, faults)
        assert f"{scenario.call}: CUDA_ERROR_UNKNOWN (999)" in str(faults), (scenario, faults)
        assert [left for *_, left in of_ranks] == [NOTHING] * RANKS, (scenario, of_ranks)


def test_files_that_do_not_come_through_sockets_stop_all_alike() -> None:
    scenarios = [Scenario(deaf=rank) for rank in range(RANKS)]
    for scenario, of_ranks in zip(scenarios, answers(scenarios), strict=True):
        (fault,) = {fault for fault, *_ in of_ranks}
        other = 0 if scenario.deaf else 1
        wanted = f"rank {scenario.deaf} cannot map: memory of rank {other}: its file does not come through a socket: "
        assert fault is not None
        assert wanted + "[Errno 111] Connection refused" in fault
        assert [left for *_, left in of_ranks] == [NOTHING] * RANKS, (scenario, of_ranks)


def test_a_call_that_never_returns_stops_all_alike_at_the_deadline() -> None:
    calls = (("cuMemCreate", 1), ("cuMemExportToShareableHandle", 1), ("cuMemImportFromShareableHandle", 2))
    scenarios = [
        Scenario(rank=number, call=call, count=count, hangs=True) for number, (call, count) in enumerate(calls)
    ]
    for scenario, of_ranks in zip(scenarios, answers(scenarios, WAIT_S), strict=True):
        (fault,) = {fault for fault, *_ in of_ranks}
        assert f"rank {scenario.rank} cannot" in str(fault)
        assert f"not done after {WAIT_S:g} s" in str(fault)
        assert max(seconds for _, seconds, _ in of_ranks) < WAIT_S + 4.0, (scenario, of_ranks)
        others = [left for rank, (*_, left) in enumerate(of_ranks) if rank != scenario.rank]
        assert others == [NOTHING] * (RANKS - 1), (scenario, of_ranks)


def test_an_export_that_comes_back_late_hands_nothing_out() -> None:
    """Ranks have given up, and the driver returns then."""
    entry_points = Scenario().entry_points(0)
    driver, handles = Driver(0, entry_points, FILE_DESCRIPTOR), peer.FileHandles()
    handle = driver.create(driver.rounded(1))
    files = _files()
    handles.withdraw()
    with pytest.raises(OSError, match="given up before"):
        handles.export(driver, handle)
    assert _files() == files
    assert _passing() == 0


def opens(context: RankContext, deaf: int, cannot: bool) -> tuple[Any, list[str], int, int]:
    """What is opened, the log, and the files and threads left; ``deaf``: this rank gets no file through a socket.

    ``cannot``: ranks can send files, and the last one has no memory.
    """
    agreement, files, lines = Agreement(context.group, 30.0), _files(), list[str]()
    scenario = Scenario(rank=RANKS - 1 if cannot else -1, call="cuMemCreate")
    entry_points = scenario.entry_points(context.rank)
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("llm_allreduce_plugin")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    layout = _C.make_layout(RANKS, 1, in_band_bytes=1 << 18, flagged_bytes=1 << 18)
    torchs = mock.patch.object(SymmetricMemory, "open", lambda *arguments: ("torch's", arguments[-1]))
    found: Any
    with _driver(entry_points, deaf=context.rank == deaf), torchs:
        try:
            memory: Any = peer.open_peer_memory(agreement, context.group, CPU, layout, "the rendezvous")  # type: ignore[arg-type]
        except TransportError as error:
            found = str(error)
        else:
            found = memory if isinstance(memory, tuple) else type(memory).__name__
            agreement.barrier("to have looked")
            if not isinstance(memory, tuple):
                memory.close()
    agreement.close()
    # A rank that hears of another's error first lets go where its own step ends, in a thread.
    wait_until(lambda: not any(entry_points.left().values()) and _passing() == 0 and _files() <= files)
    return found, lines, sum(entry_points.left().values()), _passing() + (_files() > files)


@pytest.mark.parametrize("deaf", range(RANKS))
def test_where_files_cannot_be_sent_torch_maps_memory_and_the_first_rank_says_why(deaf: int) -> None:
    with forked(RANKS, opens, deaf, False) as group:
        answers = [group.value(rank, 60) for rank in range(RANKS)]
    for rank, (memory, lines, *left) in enumerate(answers):
        assert memory == ("torch's", "the rendezvous")
        assert left == [0, 0]
        assert len(lines) == (rank == 0), lines
    other = 0 if deaf else 1
    assert answers[0][1] == [
        f"memory of ranks is mapped by torch's symmetric memory: rank {deaf} cannot get a file: that of rank {other} "
        "does not come through a socket: [Errno 111] Connection refused"
    ]


def test_where_they_can_be_sent_an_error_is_final() -> None:
    """What has no memory has none in torch's hands either."""
    with forked(RANKS, opens, -1, True) as group:
        answers = [group.value(rank, 60) for rank in range(RANKS)]
    assert len({memory for memory, *_ in answers}) == 1
    for memory, lines, *left in answers:
        assert (
            f"rank {RANKS - 1} cannot allocate memory that its peers can map: cuMemCreate: CUDA_ERROR_UNKNOWN (999)"
            in memory
        )
        assert lines == []
        assert left == [0, 0]


def test_files_are_what_is_taken() -> None:
    with forked(RANKS, opens, -1, False) as group:
        assert [group.value(rank, 60) for rank in range(RANKS)] == [("PeerMemory", [], 0, 0)] * RANKS


def workspace(context: RankContext) -> tuple[bool, int, int]:
    """A whole workspace: whether its bytes are where its base says, words that hold the marker, and what is left."""
    layout = _C.make_layout(RANKS, 1, in_band_bytes=1 << 18, flagged_bytes=1 << 18)
    agreement, entry_points = Agreement(context.group, 30.0), Scenario().entry_points(context.rank)
    with _driver(entry_points):
        memory = peer.PeerMemory.open(agreement, CPU, layout)
        assert memory.own is not None
        words = memory.own.view(torch.int32)
        marked = int((words == _C.IN_BAND_MARKER - (1 << 32)).sum())
        same = memory.own.data_ptr() == memory.bases[context.rank]
        agreement.barrier("to have looked")
        del words
        memory.close()
        assert memory.own is None
    agreement.close()
    return same, marked, sum(entry_points.left().values())


def test_a_workspace_is_as_the_first_call_needs_it_and_goes_whole() -> None:
    layout = _C.make_layout(RANKS, 1, in_band_bytes=1 << 18, flagged_bytes=1 << 18)
    slots = (layout.flagged.one_shot_offset or layout.total_bytes) - layout.in_band.one_shot_offset
    assert slots > 0
    with forked(RANKS, workspace) as group:
        assert [group.value(rank, 60) for rank in range(RANKS)] == [(True, slots // 4, 0)] * RANKS


def dropped(context: RankContext) -> list[int]:
    """What the driver has of a workspace that is there, and of one that nobody has any more."""
    layout = _C.make_layout(RANKS, 1, in_band_bytes=1 << 18, flagged_bytes=1 << 18)
    agreement, entry_points = Agreement(context.group, 30.0), Scenario().entry_points(context.rank)
    with _driver(entry_points):
        memory: peer.PeerMemory | None = peer.PeerMemory.open(agreement, CPU, layout)
        there = sum(entry_points.left().values())
        agreement.barrier("to have looked")
        memory = None
        del memory
        wait_until(lambda: not any(entry_points.left().values()))
    agreement.close()
    return [there > 0, sum(entry_points.left().values())]


def test_what_nobody_has_is_let_go_of() -> None:
    """As a communicator that was never closed."""
    with forked(RANKS, dropped) as group:
        assert [group.value(rank, 60) for rank in range(RANKS)] == [[True, 0]] * RANKS


def dropped_in_a_capture(context: RankContext) -> list[int]:
    """What the driver has of a workspace that nobody has any more: in a capture, and once another has been opened."""
    layout = _C.make_layout(RANKS, 1, in_band_bytes=1 << 18, flagged_bytes=1 << 18)
    agreement, first, second = Agreement(context.group, 30.0), Scenario().entry_points(0), Scenario().entry_points(0)
    gpu: Any = mock.Mock(device=torch.device("cuda", 0))
    with _driver(first):
        memory: peer.PeerMemory | None = peer.PeerMemory.open(agreement, CPU, layout)
    assert memory is not None
    memory.own = gpu
    agreement.barrier("to have looked")
    captures = mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True)
    with captures, mock.patch.object(torch.cuda, "synchronize") as waited:
        memory = None
        del memory
    in_capture = [waited.call_count, first.left()["mapped"]]
    agreement.barrier("to have dropped it")
    with _driver(second), mock.patch.object(torch.cuda, "synchronize") as waited:
        other = peer.PeerMemory.open(agreement, CPU, layout)
        agreement.barrier("to have looked")
        other.close()
    agreement.close()
    return [*in_capture, waited.call_count, sum(first.left().values()), sum(second.left().values())]


def test_what_was_dropped_in_a_capture_is_let_go_of_by_the_next_start() -> None:
    with forked(RANKS, dropped_in_a_capture) as group:
        assert [group.value(rank, 60) for rank in range(RANKS)] == [[0, RANKS, 1, 0, 0]] * RANKS


def of_two_hosts(context: RankContext, refused: int) -> tuple[int | str, bool, int]:
    """What a rank of two hosts maps, or why not; ``refused``: the rank whose driver takes no file."""
    outer = Agreement(context.group, 30.0)
    scenario = Scenario(rank=refused, call="cuMemImportFromShareableHandle")
    entry_points = scenario.entry_points(context.rank)
    agreement = HostAgreement(outer, Places.of((0, 0, 1, 1), context.rank))
    layout = _C.make_layout(2, 1, in_band_bytes=1 << 18, flagged_bytes=1 << 18)
    found: int | str
    with _driver(entry_points):
        try:
            memory: Any = peer.open_peer_memory(agreement, context.group, CPU, layout)
        except TransportError as error:
            found = str(error)
        else:
            found = len(memory.bases)
            outer.barrier("to have looked")
            memory.close()
    wait_until(lambda: not any(entry_points.left().values()) and _passing() == 0)
    abandoned = outer.abandoned
    outer.close()
    return found, abandoned, sum(entry_points.left().values()) + _passing()


def test_ranks_of_two_hosts_map_those_of_their_own() -> None:
    with forked(4, of_two_hosts, -1) as group:
        assert [group.value(rank, 60) for rank in range(4)] == [(2, False, 0)] * 4


def test_an_error_names_ranks_as_the_whole_group_counts_them() -> None:
    with forked(4, of_two_hosts, 3) as group:
        answers = [group.value(rank, 60) for rank in range(4)]
    for found, _, left in answers:
        assert str(found).startswith("rank 3 cannot map: memory of rank 2: cuMemImportFromShareableHandle: ")
        assert left == 0


def visible(context: RankContext, by_files: bool) -> tuple[bool, bool, int, list[Any]]:
    """Of memory that peers see: whether it is where they write, and a tensor outlives it; then what is left.

    The last is what torch was asked for.
    """
    agreement, entry_points, asked = Agreement(context.group, 30.0), Scenario().entry_points(context.rank), list[Any]()

    def by_torch(_agreement: Agreement, _group: object, _device: object, size: int) -> Any:
        asked.append(size)
        whole = torch.zeros(size, dtype=torch.uint8)
        return whole, None, [whole.data_ptr()] * RANKS

    with _driver(entry_points), mock.patch.object(symmetric, "share", by_torch):
        buffer: Any = PeerVisibleBuffer.open(agreement, context.group, CPU, 4096, by_files=by_files)
        assert buffer.peer_distances[context.rank] == 0
        tensor, after = buffer.storage[:64].view(8, 8), (context.rank + 1) % RANKS
        assert buffer.holds(tensor)
        agreement.barrier("to have opened it")
        if by_files:
            mapped.bytes_at(tensor.data_ptr() + buffer.peer_distances[after], 64, CPU).fill_(context.rank + 1)
        else:
            tensor.fill_((context.rank - 1) % RANKS + 1)  # as the one before would
        agreement.barrier("to have written")
        before = (context.rank - 1) % RANKS
        there = bool((tensor == before + 1).all())
        buffer = None
        del buffer
        lives = bool((tensor == before + 1).all()) and any(entry_points.left().values()) == by_files
        agreement.barrier("to have looked")
        del tensor
        wait_until(lambda: not any(entry_points.left().values()))
    agreement.close()
    return there, lives, sum(entry_points.left().values()), asked


def test_memory_that_peers_see_is_mapped_alike_and_lives_as_long_as_a_tensor_of_it() -> None:
    with forked(RANKS, visible, True) as group:
        assert [group.value(rank, 60) for rank in range(RANKS)] == [(True, True, 0, [])] * RANKS


def test_memory_that_peers_see_is_torchs_where_files_cannot_be_sent() -> None:
    with forked(RANKS, visible, False) as group:
        assert [group.value(rank, 60) for rank in range(RANKS)] == [(True, True, 0, [4096])] * RANKS


def registered(context: RankContext) -> tuple[bool, bool, int]:
    """Of a registered pool: whether peers' bytes arrive, whether a tensor outlives it, and what the driver has then."""
    agreement, entry_points = Agreement(context.group, 30.0), Scenario().entry_points(context.rank)
    with _driver(entry_points):
        pool = RegisteredPool.open(agreement, context.group, CPU, Transport.SYMMETRIC, 1 << 20, 1 << 16, by_files=True)
        output = pool.take((64,), torch.uint8)
        assert output is not None
        offset = output.data_ptr() - pool.bases[context.rank]
        after = (context.rank + 1) % RANKS
        agreement.barrier("to have taken it")
        mapped.bytes_at(pool.bases[after] + offset, 64, CPU).fill_(context.rank + 1)
        agreement.barrier("to have written")
        arrived = bool((output == (context.rank - 1) % RANKS + 1).all())
        pool.close()
        del pool
        lives = any(entry_points.left().values()) and bool((output == (context.rank - 1) % RANKS + 1).all())
        agreement.barrier("to have looked")
        del output
        wait_until(lambda: not any(entry_points.left().values()))
    agreement.close()
    return arrived, lives, sum(entry_points.left().values())


def test_registered_memory_is_mapped_alike_and_lives_as_long_as_a_tensor_of_it() -> None:
    with forked(RANKS, registered) as group:
        assert [group.value(rank, 60) for rank in range(RANKS)] == [(True, True, 0)] * RANKS
