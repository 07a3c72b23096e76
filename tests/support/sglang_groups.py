"""SGLang's own groups of two processes: ``python -m tests.support.sglang_groups STORE`` prints what each rank saw.

Run for any version of SGLang that PYTHONPATH has.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.forked import left_in_shm
from tests.support.sglang_stand_in import fusion_attribute, load

NAMES = ("tp", "pdmux_prefill_tp", "attention_tp", "pp")
AT_ONCE = NAMES[:2]  # as PD-multiplexing runs them
ROUNDS = 4
LATER = 0.2  # seconds; a call that has not begun after them makes this test weaker, not wrong


def rank_main(rank: int, store: str) -> None:
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    from sglang.srt.distributed import parallel_state

    parallel_state.init_distributed_environment(
        world_size=2, rank=rank, distributed_init_method=f"file://{store}", local_rank=rank, backend="gloo"
    )
    options = {"use_pynccl": False, "use_custom_allreduce": False}
    make = parallel_state.init_model_parallel_group
    groups = {name: make([[0, 1]], rank, "gloo", group_name=name, **options) for name in NAMES}
    seen: dict[str, Any] = {"rank": rank, "groups": {}}
    for turn in range(3):  # two groups of the same ranks, by turns
        for number, (name, group) in enumerate(groups.items()):
            x = torch.full((3, 8), float((rank + 1) * (number + 1) * (turn + 1)))
            before = x.clone()
            total = group.all_reduce(x)
            assert torch.equal(total, torch.full((3, 8), 3.0 * (number + 1) * (turn + 1))), (name, total)
            if communicator_of(group) is not None:
                assert torch.equal(x, before), "the input was written"
    mapped = shared_memory()
    both_at_once(groups, rank)
    # Sizes that were not there before, and the largest ones, need nothing new: CUDA graphs may rely on what is there.
    for rows in (1, 7, 300, 5000):
        for name in AT_ONCE:
            total = groups[name].all_reduce(torch.full((rows, 64), float(rank + 1)))
            assert torch.equal(total, torch.full((rows, 64), 3.0)), (name, rows)
    assert shared_memory() == mapped, "memory was mapped after the first calls"
    # What no kernel sums goes to SGLang's own way.
    ids = torch.arange(4) * (rank + 1)
    assert torch.equal(groups["tp"].all_reduce(ids), torch.arange(4) * 3)
    for name, group in groups.items():
        communicator = communicator_of(group)
        seen["groups"][name] = None if communicator is None else communicator.report()["calls"]
    communicators = [found for group in groups.values() if (found := communicator_of(group)) is not None]
    for group in groups.values():
        group.destroy()
    assert all(communicator.report()["closed"] for communicator in communicators)
    assert all(communicator_of(group) is None for group in groups.values())
    sys.stdout.write(json.dumps(seen) + "\n")
    sys.stdout.flush()


def both_at_once(groups: dict[str, Any], rank: int) -> None:
    """Calls of two groups of the same ranks overlap, each with values of its own.

    One rank waits in a call of the first group, while a second thread of it goes through one of the second; its peer
    comes to the second group at once, and to the first one when that call has ended. With state or an order in common
    neither would end. Ranks take turns with this.
    """
    turn_ends = threading.Barrier(2)
    in_first = [threading.Event() for _ in range(ROUNDS)]
    store = dist.distributed_c10d._get_default_store()  # torch has no other way to it

    def calls(place: int) -> list[tuple[float, float]]:
        times = []
        for turn in range(ROUNDS):
            x = torch.full((3 + turn, 8), float((rank + 1) * (place + 1) * (turn + 1)))
            waits, second_ended = rank == turn % 2, f"the second call of turn {turn} has ended"
            if waits and place == 1:
                assert in_first[turn].wait(60)
                time.sleep(LATER)  # until the call itself has begun, too
            if not waits and place == 0:
                store.wait([second_ended], dt.timedelta(seconds=60))
            start = time.monotonic()
            if place == 0:
                in_first[turn].set()
            total = groups[AT_ONCE[place]].all_reduce(x)
            times.append((start, time.monotonic()))
            if waits and place == 1:
                store.set(second_ended, "")
            assert torch.equal(total, torch.full_like(x, 3.0 * (place + 1) * (turn + 1))), (place, turn, total)
            turn_ends.wait(60)
        return times

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(calls, range(2))
    for turn in range(rank, ROUNDS, 2):
        assert first[turn][0] < second[turn][0] < second[turn][1] < first[turn][1], (turn, first, second)


def shared_memory() -> list[str]:
    """What this process has mapped in common with others: addresses and names."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    return sorted(f"{line[0]} {line[-1]}" for line in lines if line[1].endswith("s"))


def communicator_of(group: Any) -> Any:
    return getattr(group, fusion_attribute(), None)


def main() -> None:
    load()  # before ranks are forked: once for both
    mp.start_processes(rank_main, (sys.argv[1],), 2, start_method="fork")  # type: ignore[attr-defined]
    assert left_in_shm() == []


if __name__ == "__main__":
    main()
