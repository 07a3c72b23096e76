"""Memory that ranks of one host send each other as files: all write to all, or all stop alike, and nothing is left."""

from __future__ import annotations

import time

import pytest

from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.transport import mapped, peer
from llm_allreduce_plugin.transport.driver import FILE_DESCRIPTOR, Driver
from tests.support.fake_fabric import FakeEntryPoints
from tests.support.file_ranks import CPU, RANKS, WAIT_S, Scenario, driver_of, open_count, passing_threads
from tests.support.forked import forked, wait_until

SIZE = 100_000
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
        files = open_count()
        inner = outer.nested(wait_s, "a limit", "in a test")
        outer.barrier("to begin together")
        began = time.monotonic()
        with driver_of(entry_points, deaf=scenario.deaf == context.rank):
            fault = _written_by_all(inner, context.rank)
        seconds = time.monotonic() - began
        inner.close()
        hangs = scenario.hangs and context.rank == scenario.rank

        def left(entry_points: FakeEntryPoints = entry_points, files: int = files) -> dict[str, int]:
            return {
                "driver": sum(entry_points.left().values()),
                "files": open_count() - files,
                "threads": passing_threads(),
            }

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
    files = open_count()
    handles.withdraw()
    with pytest.raises(OSError, match="given up before"):
        handles.export(driver, handle)
    assert open_count() == files
    assert passing_threads() == 0
