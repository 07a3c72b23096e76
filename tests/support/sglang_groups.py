"""SGLang's own groups of two processes: ``python -m tests.support.sglang_groups STORE`` prints what each rank saw.

Run for any version of SGLang that PYTHONPATH has.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.support.forked import left_in_shm
from tests.support.sglang_cases import fusion_attribute, load

NAMES = ("tp", "pdmux_prefill_tp", "attention_tp", "pp")


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


def communicator_of(group: Any) -> Any:
    return getattr(group, fusion_attribute(), None)


def main() -> None:
    load()  # before ranks are forked: once for both
    mp.start_processes(rank_main, (sys.argv[1],), 2, start_method="fork")  # type: ignore[attr-defined]
    assert left_in_shm() == []


if __name__ == "__main__":
    main()
