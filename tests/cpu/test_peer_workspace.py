"""Workspaces in memory that ranks of one host send each other as files: what is opened, by whom, and when it goes."""

from __future__ import annotations

import logging
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
from llm_allreduce_plugin.transport import peer
from llm_allreduce_plugin.transport.symmetric import SymmetricMemory
from tests.support.file_ranks import CPU, RANKS, Scenario, driver_of, open_count, passing_threads
from tests.support.forked import forked, wait_until


def opens(context: RankContext, deaf: int, cannot: bool) -> tuple[Any, list[str], int, int]:
    """What is opened, the log, and the files and threads left; ``deaf``: this rank gets no file through a socket.

    ``cannot``: ranks can send files, and the last one has no memory.
    """
    agreement, files, lines = Agreement(context.group, 30.0), open_count(), list[str]()
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
    with driver_of(entry_points, deaf=context.rank == deaf), torchs:
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
    wait_until(lambda: not any(entry_points.left().values()) and passing_threads() == 0 and open_count() <= files)
    return found, lines, sum(entry_points.left().values()), passing_threads() + (open_count() > files)


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
    with driver_of(entry_points):
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
    with driver_of(entry_points):
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
    with driver_of(first):
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
    with driver_of(second), mock.patch.object(torch.cuda, "synchronize") as waited:
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
    with driver_of(entry_points):
        try:
            memory: Any = peer.open_peer_memory(agreement, context.group, CPU, layout)
        except TransportError as error:
            found = str(error)
        else:
            found = len(memory.bases)
            outer.barrier("to have looked")
            memory.close()
    wait_until(lambda: not any(entry_points.left().values()) and passing_threads() == 0)
    abandoned = outer.abandoned
    outer.close()
    return found, abandoned, sum(entry_points.left().values()) + passing_threads()


def test_ranks_of_two_hosts_map_those_of_their_own() -> None:
    with forked(4, of_two_hosts, -1) as group:
        assert [group.value(rank, 60) for rank in range(4)] == [(2, False, 0)] * 4


def test_an_error_names_ranks_as_the_whole_group_counts_them() -> None:
    with forked(4, of_two_hosts, 3) as group:
        answers = [group.value(rank, 60) for rank in range(4)]
    for found, _, left in answers:
        assert str(found).startswith("rank 3 cannot map: memory of rank 2: cuMemImportFromShareableHandle: ")
        assert left == 0
