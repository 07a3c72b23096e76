"""All-reduces over two hosts that a network joins, beside NCCL's, with hosts made of GPUs of one machine.

    python benchmarks/hosts.py --hosts 2 --gpus 4 --out benchmarks/h100/hosts_2x2.json

Ranks of one host share memory; between hosts NCCL, for both, goes through sockets on the loopback device
(``NCCL_HOSTID``, ``NCCL_SOCKET_IFNAME=lo``, ``NCCL_IB_DISABLE=1``). So the times are of that network, which no cluster
has: they compare forms, and show what kernels, launches and graphs add; they do not say what a network of a cluster
would give. Microseconds per call in a CUDA graph, bf16; ``wrong``: elements with other bits than the oracle's, for
NCCL elements beyond its tolerance, for a wire format (LOWPRECISION, at every size) 1 on each rank whose error is larger
than the format's. ``exchange``: NCCL's all-gather of the sums alone, as the form that AUTO takes sends
them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.measure.answers import MOST_ERROR, make_input, relative_error, wrong_elements
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.hosts import BETWEEN, GpuHosts
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.measure.timing import Timing, time_graph
from llm_allreduce_plugin.oracle.hosts import host_ordered_sum
from llm_allreduce_plugin.transport.rail import Rail
from llm_allreduce_plugin.wire import FORMATS_BETWEEN_HOSTS

DTYPE = torch.bfloat16
KIB, MIB = 1 << 10, 1 << 20
SIZES = [16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB]
STRATEGIES = ("ONESHOT", "TWOSHOT", "AUTO", *FORMATS_BETWEEN_HOSTS)
CALLS, REPLAYS = 4, 9  # a call takes milliseconds


def _nccl(context: RankContext, mine: torch.Tensor) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        output = mine.clone()  # out of place, as all others
        dist.all_reduce(output, group=context.group)
        return output

    return call


def _exchange(context: RankContext, rail: Rail, elements: int) -> Callable[[], None]:
    sums = torch.zeros(elements, dtype=torch.float32, device=context.device)
    gathered = torch.empty(rail.hosts * elements, dtype=torch.float32, device=context.device)

    def call() -> None:
        rail.wait(rail.start(gathered, sums, 60.0), 60.0)

    return call


def _row(timing: Timing[torch.Tensor] | Timing[None]) -> dict[str, Any]:
    return {"us": round(timing.median, 1), "fastest_us": round(timing.fastest, 1)}


def _ours(context: RankContext, strategy: str, mine: torch.Tensor, expected: torch.Tensor) -> list[dict[str, Any]]:
    """A strategy, and behind AUTO the exchange of its sums alone. Collective."""
    wire = WireFormat(strategy) if strategy in set(WireFormat) else None
    settings: dict[str, Any] = {} if wire is None else {"low_precision": {"wire_format": wire, "min_bytes": 0}}
    name = strategy if wire is None else "LOWPRECISION"
    group = context.communicator(name, timeout_s=60.0, first_timeout_s=120.0, **settings)
    try:
        decision, between = group.explain(mine.shape, DTYPE), group._held.between  # noqa: SLF001
        launch = decision.launch
        if launch is None or between is None:
            message = f"{strategy} does not run over hosts here: {decision.reason}"
            raise RuntimeError(message)
        timing = time_graph(context, lambda: group.all_reduce(mine), CALLS, REPLAYS)
        assert timing.output is not None
        if wire is not None:
            wrong = int(relative_error(timing.output, expected) > MOST_ERROR[wire])
        else:
            wrong = wrong_elements(timing.output, expected, exact=True, world_size=context.world_size)
        row = {"name": strategy, "bytes": mine.nbytes, **_row(timing), "wrong": sum(context.gather(wrong))}
        rows = [row | {"form": launch.algorithm.in_words, "pieces": launch.pieces}]
        if strategy == "AUTO":
            parts = context.world_size // between.rail.hosts if launch.algorithm is Algorithm.TWO_SHOT else 1
            elements = -(-mine.numel() // parts)
            alone = time_graph(context, _exchange(context, between.rail, elements), CALLS, REPLAYS)
            rows.append({"name": "exchange", "bytes": mine.nbytes, **_row(alone), "exchanged_bytes": elements * 4})
        return rows
    finally:
        torch.cuda.synchronize(context.device)
        group.close()


def measure(context: RankContext, hosts: tuple[int, ...], size: int) -> list[dict[str, Any]]:
    """All implementations at one size. Collective."""
    count, seed, ranks = size // DTYPE.itemsize, context.shared_seed(), range(context.world_size)
    inputs = [make_input(seed, rank, count, DTYPE, context.device) for rank in ranks]
    mine, expected = inputs[context.rank], host_ordered_sum(inputs, hosts)
    del inputs
    timing = time_graph(context, _nccl(context, mine), CALLS, REPLAYS)
    assert timing.output is not None
    wrong = wrong_elements(timing.output, expected, exact=False, world_size=context.world_size)
    rows = [{"name": "NCCL", "bytes": size, **_row(timing), "wrong": sum(context.gather(wrong))}]
    for strategy in STRATEGIES:
        rows += _ours(context, strategy, mine, expected)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="of all hosts")
    parser.add_argument("--largest", type=int, default=64 * MIB, help="bytes of the largest message")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.gpus % arguments.hosts or arguments.gpus > torch.cuda.device_count():
        most = torch.cuda.device_count()
        parser.error(f"--gpus {arguments.gpus}: must be a multiple of --hosts, and at most {most}, which are here")
    hosts = tuple(rank * arguments.hosts // arguments.gpus for rank in range(arguments.gpus))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache, GpuHosts(hosts, cache) as pool:
        try:
            for size in (size for size in SIZES if size <= arguments.largest):
                found = pool.run(measure, hosts, size, timeout_s=300)[0]
                rows += found
                print(f"{size:>9}: " + "  ".join(f"{row['name']} {row['us']}" for row in found))
        finally:
            if arguments.out and rows:
                write_record(arguments.out, rows, harness=__doc__, hosts=hosts, between=BETWEEN)
    wrong = sum(row.get("wrong", 0) for row in rows)
    print(f"{len(rows)} rows, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
