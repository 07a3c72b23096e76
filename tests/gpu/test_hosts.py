"""Ranks on GPUs as ranks of several hosts, NCCL between them through sockets: bits of every form, and hosts that end.

Two GPUs as two hosts, and two hosts of two ranks: on four GPUs, or on two that ranks of different hosts share.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm_allreduce_plugin import AllReduceConfig, PeerTimeoutError, StartTimeoutError, TensorParallelCommunicator
from llm_allreduce_plugin.algorithms import measured, network
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.measure.hosts import GpuHosts
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.oracle.hosts import compressed_host_sum, host_ordered_sum
from llm_allreduce_plugin.wire import FORMATS_BETWEEN_HOSTS
from tests.support import checks
from tests.support.forked import left_in_shm
from tests.support.hosts import telling_inputs
from tests.support.reference import DTYPES, assert_same_bits, bits, rank_input, special_inputs

pytestmark = pytest.mark.gpu(2)

Hosts = tuple[int, ...]
TWO_OF_ONE: Hosts = (0, 1)
TWO_OF_TWO: Hosts = (0, 0, 1, 1)
MIXED: Hosts = (0, 1, 0, 1)  # ranks of a host need not follow each other
LAYOUTS = pytest.mark.parametrize("hosts", (TWO_OF_ONE, TWO_OF_TWO, MIXED), ids=str)
STRATEGIES = ("ONESHOT", "TWOSHOT", "AUTO")
SIZES = (0, 1, 7, 8, 9, 17, 1023, 70_001, 1_100_003)
MIB = 1 << 20
PERIOD = 1_000_003  # elements after which large inputs repeat: no size of a piece, a part or a chunk divides it


class _Pools:
    """One pool at a time: idle ranks hold memory of GPUs."""

    def __init__(self, cache: str) -> None:
        self._cache = cache
        self._pool: GpuHosts | None = None

    def __call__(self, hosts: Hosts) -> GpuHosts:
        pool = self._pool
        if pool is None or pool.hosts != hosts or not all(process.is_alive() for process in pool.processes):
            self.close()
            pool = self._pool = GpuHosts(hosts, self._cache)
        return pool

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Pools]:
    made = _Pools(str(tmp_path_factory.mktemp("cache")))
    yield made
    made.close()


@contextlib.contextmanager
def over(context: RankContext, hosts: Hosts, strategy: str, **settings: Any) -> Iterator[TensorParallelCommunicator]:
    """A communicator that goes over these hosts, and nothing else has run when it ends."""
    with checks.communicator(context, strategy, **{"timeout_s": 60.0, "first_timeout_s": 60.0, **settings}) as group:
        assert group.facts.hosts == hosts
        assert group.facts.crosses_network, group.facts
        yield group
        counts = group.report()["calls"]
        assert set(counts) <= {"ONESHOT", "TWOSHOT", "MINLATENCY"}, counts


def reduce_and_compare(
    context: RankContext, group: TensorParallelCommunicator, hosts: Hosts, inputs: Sequence[torch.Tensor], what: str
) -> None:
    mine = inputs[context.rank].to(context.device)
    before = mine.clone()
    with checks.poisoned_memory():
        output = group.all_reduce(mine)
    assert_same_bits(output, host_ordered_sum(inputs, hosts), what)
    assert torch.equal(bits(mine), bits(before)), f"{what}: the input was written"
    assert output.numel() == 0 or output.data_ptr() != mine.data_ptr(), f"{what}: the output aliases the input"


def _sizes(context: RankContext, hosts: Hosts, strategy: str, seed: int) -> None:
    with over(context, hosts, strategy, transport="peer") as group:  # nothing but memory of GPUs, inside a host
        for dtype in DTYPES:
            for size in SIZES:
                inputs = telling_inputs(seed + size, context.world_size, size, dtype)
                what = f"{strategy} {dtype} x {size}, hosts {hosts}, {seed=}"
                reduce_and_compare(context, group, hosts, inputs, what)
            specials = special_inputs(context.world_size, dtype)
            reduce_and_compare(context, group, hosts, specials, f"{strategy} {dtype}, special values")
            odd = [part[1:] for part in specials]
            reduce_and_compare(context, group, hosts, odd, f"{strategy} {dtype}, unaligned")


@pytest.mark.parametrize("strategy", STRATEGIES)
@LAYOUTS
def test_sizes(pools: _Pools, hosts: Hosts, strategy: str) -> None:
    pools(hosts).run(_sizes, hosts, strategy, int.from_bytes(os.urandom(4), "little"))


def _compressed(context: RankContext, hosts: Hosts, wire: str, seed: int) -> None:
    """Eager and replayed; the ends of parts lie within packets, and one of the messages goes in pieces."""
    before, measured.NETWORK_PIECE_BYTES = measured.NETWORK_PIECE_BYTES, 200_000
    settings = {"wire_format": wire, "min_bytes": 0}
    try:
        with checks.communicator(
            context, "LOWPRECISION", timeout_s=60.0, first_timeout_s=60.0, low_precision=settings
        ) as group:
            assert group.facts.crosses_network
            for dtype in (torch.bfloat16, torch.float16):
                for size in (1, 9, 497, 1023, 4099, 70_001, 1_100_003):
                    inputs = [rank_input(seed + size, rank, size, dtype) for rank in range(context.world_size)]
                    mine = inputs[context.rank].to(context.device)
                    launch = group.explain((size,), dtype).launch
                    assert launch is not None
                    assert launch.wire_format == wire
                    want = compressed_host_sum(inputs, WireFormat(wire), hosts, network.cuts(size, launch.pieces)[0][1])
                    what = f"{wire} {dtype} x {size}, hosts {hosts}, {seed=}"
                    with checks.poisoned_memory():
                        assert_same_bits(group.all_reduce(mine), want, what)
                        graph = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph):
                            output = group.all_reduce(mine)
                    for _ in range(3):
                        graph.replay()
                    assert_same_bits(output, want, f"{what}, replayed")
                    context.gather(None)
            assert set(group.report()["calls"]) == {"LOWPRECISION"}
    finally:
        measured.NETWORK_PIECE_BYTES = before


@pytest.mark.parametrize("wire", FORMATS_BETWEEN_HOSTS)
@pytest.mark.parametrize("hosts", (TWO_OF_ONE, TWO_OF_TWO), ids=str)
def test_compressed_between_hosts(pools: _Pools, hosts: Hosts, wire: str) -> None:
    pools(hosts).run(_compressed, hosts, wire, int.from_bytes(os.urandom(4), "little"))


def _through_host_memory(context: RankContext, hosts: Hosts, seed: int) -> None:
    """GPUs of a host that do not reach each other."""
    for strategy in ("ONESHOT", "TWOSHOT"):
        with over(context, hosts, strategy, transport="host") as group:
            for size in (1, 1023, 1_100_003):
                inputs = telling_inputs(seed + size, context.world_size, size, torch.bfloat16)
                reduce_and_compare(context, group, hosts, inputs, f"{strategy} x {size} through host memory, {seed=}")


def test_through_host_memory(pools: _Pools) -> None:
    pools(TWO_OF_TWO).run(_through_host_memory, TWO_OF_TWO, int.from_bytes(os.urandom(4), "little"))


def _large(context: RankContext, hosts: Hosts, strategy: str, seed: int) -> list[int]:
    """To 64 MiB and a bit; pieces of each message. Compared on the GPU."""
    found = []
    with over(context, hosts, strategy) as group:
        for dtype in (torch.bfloat16, torch.float32):
            parts = telling_inputs(seed, context.world_size, PERIOD, dtype)
            for payload in (4 * MIB, 16 * MIB, 64 * MIB):
                for size in (payload // dtype.itemsize, payload // dtype.itemsize + 1):
                    inputs = [part.to(context.device).repeat(-(-size // PERIOD))[:size] for part in parts]
                    launch = group.explain((size,), dtype).launch
                    assert launch is not None
                    found.append(launch.pieces)
                    with checks.poisoned_memory():
                        output = group.all_reduce(inputs[context.rank])
                    want = host_ordered_sum(inputs, hosts)
                    wrong = (bits(output) != bits(want)).nonzero()
                    assert not len(wrong), f"{strategy} {dtype} x {size}: {len(wrong)} wrong, first at {int(wrong[0])}"
    return found


@pytest.mark.parametrize("strategy", ("ONESHOT", "TWOSHOT"))
@pytest.mark.parametrize("hosts", (TWO_OF_ONE, TWO_OF_TWO), ids=str)
def test_large_messages(pools: _Pools, hosts: Hosts, strategy: str) -> None:
    for found in pools(hosts).run(_large, hosts, strategy, int.from_bytes(os.urandom(4), "little")):
        assert {1, measured.NETWORK_MOST_PIECES} <= set(found), "small ones go whole, large ones in pieces"


# -- graphs ------------------------------------------------------------------------------------------------------------


def _capture(
    group: TensorParallelCommunicator, static: torch.Tensor
) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """Two calls, one on what the other gives."""
    graph = torch.cuda.CUDAGraph()
    with checks.poisoned_memory(), torch.cuda.graph(graph):
        once = group.all_reduce(static)
        outputs = [once, group.all_reduce(once)]
    return graph, outputs


def _replays(context: RankContext, hosts: Hosts, strategy: str, seed: int) -> None:
    """Graphs of messages of one piece and of several, replayed in any order, eager calls between, and one dropped."""
    generator = torch.Generator().manual_seed(seed)  # the same choices on every rank
    before, measured.NETWORK_PIECE_BYTES = measured.NETWORK_PIECE_BYTES, 200_000
    try:
        with over(context, hosts, strategy) as group:
            shapes = [(4096, torch.bfloat16), (70_001, torch.float16), (300_017, torch.float32)]
            statics = [torch.zeros(size, dtype=dtype, device=context.device) for size, dtype in shapes]
            launches = [group.explain((size,), dtype).launch for size, dtype in shapes]
            assert [launch.pieces for launch in launches if launch is not None] == [1, 1, 4]
            for static in statics:
                group.all_reduce(static)  # before a capture, as engines do
            graphs = [_capture(group, static) for static in statics]
            dropped = _capture(group, statics[0])
            del dropped
            for turn in range(24):
                choice = int(torch.randint(0, 4, (), generator=generator))
                if choice == 3:
                    size = int(torch.randint(1, 50_000, (), generator=generator))
                    inputs = telling_inputs(seed + turn, context.world_size, size, torch.bfloat16)
                    reduce_and_compare(context, group, hosts, inputs, f"{strategy}, eager, turn {turn}, {seed=}")
                    continue
                size, dtype = shapes[choice]
                inputs = telling_inputs(seed + turn, context.world_size, size, dtype)
                statics[choice].copy_(inputs[context.rank])
                graph, outputs = graphs[choice]
                graph.replay()
                once = host_ordered_sum(inputs, hosts)
                twice = host_ordered_sum([once] * context.world_size, hosts)
                for output, want in zip(outputs, (once, twice), strict=True):
                    assert_same_bits(output, want, f"{strategy} {dtype} x {size}, replayed, turn {turn}, {seed=}")
            context.gather(None)
    finally:
        measured.NETWORK_PIECE_BYTES = before


@pytest.mark.parametrize("strategy", ("ONESHOT", "TWOSHOT"))
@LAYOUTS
def test_graphs(pools: _Pools, hosts: Hosts, strategy: str) -> None:
    pools(hosts).run(_replays, hosts, strategy, int.from_bytes(os.urandom(4), "little"))


def _many_replays(context: RankContext, hosts: Hosts, seed: int) -> None:
    """One graph, again and again without a pause, on data that changes on the device with every replay."""
    inputs = telling_inputs(seed, context.world_size, 8192, torch.bfloat16)
    static = inputs[context.rank].to(context.device)
    want = host_ordered_sum(inputs, hosts).to(context.device)
    wrong = torch.zeros((), dtype=torch.int64, device=context.device)
    with over(context, hosts, "AUTO") as group:
        group.all_reduce(static)
        graph = torch.cuda.CUDAGraph()
        with checks.poisoned_memory(), torch.cuda.graph(graph):
            static.mul_(-1)  # whose sum is the negated one, exactly
            want.mul_(-1)
            wrong.add_((group.all_reduce(static) != want).sum())
        for _ in range(500):
            graph.replay()
        torch.cuda.synchronize()
        assert int(wrong) == 0, f"{int(wrong)} wrong elements, {seed=}"
        context.gather(None)


@pytest.mark.parametrize("hosts", (TWO_OF_ONE, TWO_OF_TWO), ids=str)
def test_many_replays(pools: _Pools, hosts: Hosts) -> None:
    pools(hosts).run(_many_replays, hosts, int.from_bytes(os.urandom(4), "little"))


# -- groups that are a part of the world -------------------------------------------------------------------------------

THREE_OF_TWO: Hosts = (0, 0, 1, 1, 2, 2)


def _part_of_the_world(context: RankContext, seed: int) -> float:
    """The default group is bound to a device, and NCCL splits such a one for new groups only if all its ranks come."""
    members = [0, 1, 2, 3]
    group = dist.new_group(members, backend="nccl")
    control = dist.new_group(members, backend="gloo")
    if context.rank not in members:
        return 0.0
    assert group is not None
    part = RankContext(context.rank, len(members), context.device, group, control)
    began = time.monotonic()
    with over(part, TWO_OF_TWO, "TWOSHOT", start_timeout_s=60.0) as made:
        took_s = time.monotonic() - began
        inputs = telling_inputs(seed, len(members), 10_007, torch.bfloat16)
        reduce_and_compare(part, made, TWO_OF_TWO, inputs, "a part of the world")
    return took_s


def test_a_group_that_is_a_part_of_the_world(pools: _Pools) -> None:
    for took_s in pools(THREE_OF_TWO).run(_part_of_the_world, int.from_bytes(os.urandom(4), "little")):
        assert took_s < 50, "the start has waited for ranks that are not of the group"


# -- what may go wrong -------------------------------------------------------------------------------------------------

TIMEOUT_S = 4.0
Outcome = tuple[int, float, str, float]


def _until_it_fails(context: RankContext, victims: Sequence[int], how: str) -> Outcome:
    """Whom the error names, when after the attack it came, its text, and how long the end took."""
    settings: dict[str, Any] = {"timeout_s": TIMEOUT_S, "first_timeout_s": 60.0, "allreduce_strategy": "TWOSHOT"}
    config = AllReduceConfig(**settings)
    group = TensorParallelCommunicator(context.group, context.device, config, control_group=context.control_group)
    assert group.facts.crosses_network
    mine = torch.ones(10_000, dtype=torch.bfloat16, device=context.device)
    for _ in range(3):
        group.all_reduce(mine)
    torch.cuda.synchronize()
    context.gather(None)
    if context.rank in victims:
        if how == "stays away":
            time.sleep(TIMEOUT_S + 40)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    error: PeerTimeoutError | None = None
    try:
        group.all_reduce(mine)
        while time.monotonic() < began + TIMEOUT_S + 20:
            group.check()
            time.sleep(0.01)
    except PeerTimeoutError as caught:
        error = caught
    took_s = time.monotonic() - began
    assert error is not None, "nothing was raised"
    with pytest.raises(PeerTimeoutError):
        group.all_reduce(mine)
    began = time.monotonic()
    with contextlib.suppress(Exception):  # what CUDA says of the context
        group.close()
    return error.peer, took_s, str(error), time.monotonic() - began


def _attacked(tmp: Any, hosts: Hosts, victims: Sequence[int], how: str) -> dict[int, Outcome]:
    """Outcomes of those that are left. A pool of their own: their CUDA contexts are gone."""
    pool = GpuHosts(hosts, str(tmp))
    others = [rank for rank in range(len(hosts)) if rank not in victims]
    try:
        for rank in victims:
            pool._pipes[rank].send((_until_it_fails, (victims, how)))
        found = pool.run(_until_it_fails, victims, how, ranks=others, timeout_s=120)
    finally:
        pids = [process.pid for process in pool.processes]
        pool.kill()
    for process in pool.processes:
        process.join(20)
    assert left_in_shm(pids) == []
    return dict(zip(others, found, strict=True))


@pytest.mark.parametrize("how", ("killed", "stays away"))
@pytest.mark.parametrize("hosts", (TWO_OF_ONE, TWO_OF_TWO), ids=str)
def test_a_host_that_is_gone_is_named_in_time(tmp_path: Any, hosts: Hosts, how: str) -> None:
    size = len(hosts) // 2
    outcomes = _attacked(tmp_path, hosts, range(size, 2 * size), how)
    for rank, (peer, took_s, text, close_s) in outcomes.items():
        assert peer == rank + size, text
        assert f"rank {rank} on host 0 waited" in text, text
        assert f"for rank {rank + size} on host 1 in the exchange" in text, text
        assert ("nothing was heard" if how == "killed" else "lives but has not come") in text, text
        assert took_s < TIMEOUT_S + 5, text
        assert close_s < TIMEOUT_S + 12, "the driver takes seconds to end a context"


def test_one_rank_that_is_gone_ends_both_hosts(tmp_path: Any) -> None:
    """Its own host by the wait there, the others by what that host says, or by its silence."""
    outcomes = _attacked(tmp_path, TWO_OF_TWO, (3,), "killed")
    assert outcomes[2][0] == 3
    assert outcomes[1][0] == 3
    assert f"rank 2 waited {TIMEOUT_S:g}" in outcomes[2][2], outcomes[2]
    for rank in (0, 1, 2):
        assert outcomes[rank][1] < TIMEOUT_S + 5, outcomes[rank]


def _start_without(context: RankContext, absent: int) -> tuple[str, float]:
    if context.rank == absent:
        time.sleep(8)
        return "", 0.0
    began = time.monotonic()
    with pytest.raises(StartTimeoutError) as caught:
        context.communicator("AUTO", start_timeout_s=3.0)
    return str(caught.value), time.monotonic() - began


def test_a_host_that_does_not_come_to_the_start(tmp_path: Any) -> None:
    with GpuHosts(TWO_OF_TWO, str(tmp_path)) as pool:  # of its own: one rank has taken a step less than the others
        found = pool.run(_start_without, 3)[:3]
    for text, took_s in found:
        assert "rank 3" in text
        assert "at the start" in text
        assert took_s < 3 + 5
