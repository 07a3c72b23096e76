"""Ranks on GPUs of their own, one process each, through the communicator."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm_allreduce_plugin import AllReduceConfig, NodeTopology, PeerTimeoutError, TensorParallelCommunicator
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from tests.conftest import PoolFor
from tests.support import checks
from tests.support.local_group import CONTEXT_END_S
from tests.support.reference import DTYPES, SIZES, assert_same_bits, poison, rank_input, rank_ordered_sum

pytestmark = pytest.mark.gpu(2, per_rank=True)

WORLD_SIZES = (2, 3, 4)
STRATEGIES = ("ONESHOT", "TWOSHOT", "MINLATENCY")
Settings = dict[str, Any]
SMALL_WORKSPACE: Settings = {"workspace_bytes": 4 << 20}
READINESS = pytest.mark.parametrize(
    "settings", ({}, {"in_band": False}, {"transport": "host"}), ids=("in band", "flagged", "host")
)


@READINESS
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sizes(gpu_pool: PoolFor, world_size: int, dtype: torch.dtype, strategy: str, settings: Settings) -> None:
    gpu_pool(world_size).run(checks.check_sizes, strategy, dtype, SIZES, settings)


@READINESS
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", (2, 4))
def test_messages_larger_than_the_workspace(
    gpu_pool: PoolFor, world_size: int, strategy: str, settings: Settings
) -> None:
    gpu_pool(world_size).run(checks.check_sizes, strategy, torch.bfloat16, (12_345_678,), settings | SMALL_WORKSPACE)


@READINESS
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_special_values(gpu_pool: PoolFor, world_size: int, settings: Settings) -> None:
    pool = gpu_pool(world_size)
    for dtype in DTYPES:
        answers = [pool.run(checks.check_specials, strategy, dtype, settings) for strategy in STRATEGIES]
        everyone = {digest for answer in answers for digests in answer for digest in digests}
        assert len(everyone) == 1, "ranks and strategies must agree to the bit, NaN included"


@READINESS
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", (2, 4))
def test_views(gpu_pool: PoolFor, world_size: int, strategy: str, settings: Settings) -> None:
    for dtype in DTYPES:
        gpu_pool(world_size).run(checks.check_views, strategy, dtype, settings)


@READINESS
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_strategies_and_batch_sizes_agree(gpu_pool: PoolFor, world_size: int, settings: Settings) -> None:
    gpu_pool(world_size).run(checks.check_strategies_agree, torch.bfloat16, 1 << 18, settings)


@READINESS
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_mixed_sequence(gpu_pool: PoolFor, world_size: int, settings: Settings) -> None:
    gpu_pool(world_size).run(checks.check_sequence, 300, settings | SMALL_WORKSPACE)


def _large_and_unaligned(context: RankContext, strategy: str) -> None:
    """Large messages have lanes with one task each, on every rank, however a rank's tensor lies."""
    size = 12 << 20
    with checks.communicator(context, strategy) as group:
        launch = group.explain((size,), torch.float32).launch
        assert launch is not None
        assert launch.scatter_lanes > 0
        for first_unaligned in (context.world_size, 1, 0):
            seed = context.shared_seed()
            inputs = [rank_input(seed, rank, size, torch.float32) for rank in range(context.world_size)]
            storage = torch.empty(size + 4, device=context.device)
            mine = storage[3 if context.rank >= first_unaligned else 0 :][:size]
            mine.copy_(inputs[context.rank])
            assert_same_bits(group.all_reduce(mine), rank_ordered_sum(inputs), f"{strategy}, {first_unaligned}")


@pytest.mark.parametrize(("world_size", "strategy"), [(2, "ONESHOT"), (3, "TWOSHOT"), (4, "TWOSHOT")])
def test_large_and_unaligned(gpu_pool: PoolFor, world_size: int, strategy: str) -> None:
    gpu_pool(world_size).run(_large_and_unaligned, strategy)


def _read_in_place(context: RankContext, dtype: torch.dtype) -> None:
    """Inputs in peer-visible memory, whole and in slices, overwritten right behind each call."""
    with checks.communicator(context, "TWOSHOT") as group:
        shared = group.peer_visible_empty((300_000,), dtype)
        for first, size in ((0, 300_000), (8, 4096), (1024, 40_008), (3, 999), (0, 16), (64, 262_144)):
            seed = context.shared_seed()
            inputs = [rank_input(seed, rank, size, dtype) for rank in range(context.world_size)]
            mine = shared[first : first + size]
            mine.copy_(inputs[context.rank])
            output = group.all_reduce(mine)
            mine.fill_(float("nan"))  # peers must have read it by now
            assert_same_bits(output, rank_ordered_sum(inputs), f"{dtype} x {size} at {first}")
        whole = [key for key, call in group._planner.pulls.items() if call is not None]
        assert len(whole) == 5, "all but the odd one are read in place"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_inputs_read_in_place(gpu_pool: PoolFor, world_size: int, dtype: torch.dtype) -> None:
    gpu_pool(world_size).run(_read_in_place, dtype)


# -- staged ------------------------------------------------------------------------------------------------------------

STAGED: Settings = {"staged": "on"}


def _is_staged(context: RankContext) -> None:
    with checks.communicator(context, "MINLATENCY", **STAGED) as group:
        launch = group.explain((1 << 22,), torch.bfloat16).launch
        assert launch is not None
        assert launch.staged
    with checks.communicator(context, "MINLATENCY") as group:
        node = NodeTopology.detect()
        assert group.facts.nvlink == (not node.nvlink_gap(range(context.world_size))), node.links


@pytest.mark.parametrize("world_size", (3, 4))
def test_staged(gpu_pool: PoolFor, world_size: int) -> None:
    pool = gpu_pool(world_size)
    pool.run(_is_staged)
    for dtype in DTYPES:
        pool.run(checks.check_sizes, "TWOSHOT", dtype, (*SIZES, 12_345_678), STAGED)
    pool.run(checks.check_sizes, "TWOSHOT", torch.bfloat16, (12_345_678,), STAGED | SMALL_WORKSPACE)
    pool.run(checks.check_views, "TWOSHOT", torch.bfloat16, STAGED)
    for settings in (STAGED | SMALL_WORKSPACE, STAGED | SMALL_WORKSPACE | {"in_band": False}):
        pool.run(checks.check_sequence, 200, settings)
    pool.run(_replay_many, "TWOSHOT", 2000, STAGED)
    pool.run(_interleave, STAGED)


# -- graphs ------------------------------------------------------------------------------------------------------------


def _capture(function: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph


def _replay_many(context: RankContext, strategy: str, replays: int, settings: Settings) -> None:
    """One graph of two calls, replayed again and again on data that changes on the device with every replay."""
    seed, size = context.shared_seed(), 8192 * 4
    inputs = [rank_input(seed, rank, size, torch.bfloat16) for rank in range(context.world_size)]
    with checks.communicator(context, strategy, **settings) as group:
        static = inputs[context.rank].to(context.device)
        total = rank_ordered_sum(inputs)
        expected = total.to(context.device)
        expected_again = rank_ordered_sum([total] * context.world_size).to(context.device)
        wrong = torch.zeros((), dtype=torch.int64, device=context.device)
        stream = torch.cuda.Stream()
        group.all_reduce(static)
        torch.cuda.synchronize()

        def step() -> None:
            # Negated inputs have the negated sum, exactly.
            static.mul_(-1)
            expected.mul_(-1)
            expected_again.mul_(-1)
            output = group.all_reduce(static)
            again = group.all_reduce(output)
            wrong.add_((output != expected).sum() + (again != expected_again).sum())
            # What the next replay does not write is seen.
            poison(output)
            poison(again)

        graph = _capture(step, stream)
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
        assert int(wrong) == 0, f"{int(wrong)} wrong elements in {replays} replays"
        assert group.report()["captured"] == {strategy: 2}
        context.gather(None)


@READINESS
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", (2, 4))
def test_graph_replayed_10000_times(gpu_pool: PoolFor, world_size: int, strategy: str, settings: Settings) -> None:
    gpu_pool(world_size).run(_replay_many, strategy, 10_000, settings)


def _interleave(context: RankContext, settings: Settings) -> None:
    """Two graphs, a third that is captured and dropped, and eager calls, in an order that changes."""
    seed = context.shared_seed()
    generator = torch.Generator().manual_seed(seed)
    world_size, device = context.world_size, context.device
    shapes = {"a": (3000, torch.bfloat16), "b": (1_000_001, torch.float16)}
    with (
        checks.communicator(context, "ONESHOT", **settings) as one,
        checks.communicator(context, "TWOSHOT", **settings) as two,
    ):
        stream = torch.cuda.Stream()
        statics = {name: torch.zeros(size, dtype=dtype, device=device) for name, (size, dtype) in shapes.items()}
        outputs: dict[str, torch.Tensor] = {}
        graphs = {}
        for name in shapes:

            def body(name: str = name) -> None:
                outputs[name] = two.all_reduce(one.all_reduce(statics[name]))

            graphs[name] = _capture(body, stream)
        dropped = _capture(lambda: one.all_reduce(two.all_reduce(statics["a"])), stream)
        del dropped
        for turn in range(60):
            choice = int(torch.randint(0, 3, (), generator=generator))
            if choice == 2:
                size = int(torch.randint(1, 50_000, (), generator=generator))
                inputs = [rank_input(seed + turn, rank, size, torch.float32) for rank in range(world_size)]
                checks.reduce_and_compare(context, (one, two)[turn % 2], inputs, f"eager, turn {turn}")
                continue
            name = "ab"[choice]
            size, dtype = shapes[name]
            inputs = [rank_input(seed + turn, rank, size, dtype) for rank in range(world_size)]
            statics[name].copy_(inputs[context.rank])
            outputs[name].fill_(float("nan"))
            graphs[name].replay()
            once = rank_ordered_sum(inputs)
            assert_same_bits(outputs[name], rank_ordered_sum([once] * world_size), f"graph {name}, turn {turn}")
        context.gather(None)


@READINESS
@pytest.mark.parametrize("world_size", (2, 4))
def test_graphs_interleaved_with_eager_calls(gpu_pool: PoolFor, world_size: int, settings: Settings) -> None:
    gpu_pool(world_size).run(_interleave, settings)


def _end_in_a_capture(context: RankContext) -> None:
    """Workspaces that end while another communicator's call is captured."""
    with checks.communicator(context, "ONESHOT") as kept:
        static = torch.ones(1000, device=context.device)
        for closed in (True, False):
            other = context.communicator("TWOSHOT")
            other.all_reduce(static)
            torch.cuda.synchronize()
            left = [other._held.workspace, other._held.memory]
            if closed:
                other.close()
            del other
            stream = torch.cuda.Stream()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                del left
                output = kept.all_reduce(static)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(output, torch.full_like(output, context.world_size))
        context.gather(None)


def test_workspaces_may_end_during_a_capture(gpu_pool: PoolFor) -> None:
    gpu_pool(2).run(_end_in_a_capture)


def _streams(context: RankContext, settings: Settings) -> None:
    """Eager calls that hop between streams without the caller ordering them."""
    seed = context.shared_seed()
    streams = [torch.cuda.Stream() for _ in range(3)]
    with checks.communicator(context, "ONESHOT", **settings) as group:
        for turn in range(60):
            inputs = [rank_input(seed + turn, rank, 100_000, torch.bfloat16) for rank in range(context.world_size)]
            mine = inputs[context.rank].to(context.device)
            torch.cuda.synchronize()
            outputs = []
            for stream in streams:
                with torch.cuda.stream(stream):
                    outputs.append(group.all_reduce(mine))
            torch.cuda.synchronize()
            for output in outputs:
                assert_same_bits(output, rank_ordered_sum(inputs), f"turn {turn}")


@READINESS
def test_unordered_streams(gpu_pool: PoolFor, settings: Settings) -> None:
    gpu_pool(2).run(_streams, settings)


# -- failures ----------------------------------------------------------------------------------------------------------


def _wait_for_absent_rank(
    context: RankContext, strategy: str, timeout_s: float, settings: Settings
) -> tuple[float, float, str]:
    """Rank 0 never calls. Seconds until the named error is there, until CUDA has stopped, and its text."""
    config = AllReduceConfig(allreduce_strategy=strategy, timeout_s=timeout_s, **settings)
    made = TensorParallelCommunicator(context.group, context.device, config, control_group=context.control_group)
    mine = torch.ones(4096, dtype=torch.bfloat16, device=context.device)
    made.all_reduce(mine)
    torch.cuda.synchronize()
    if context.rank == 0:
        time.sleep(timeout_s + 2)  # its memory must outlive the others' wait
        return 0.0, 0.0, ""
    started = time.monotonic()
    made.all_reduce(mine)
    text = ""
    while not text and time.monotonic() < started + timeout_s + 10:
        try:
            made.check()
            time.sleep(0.01)
        except PeerTimeoutError as error:
            text = str(error)
    named_after = time.monotonic() - started
    with contextlib.suppress(Exception):  # torch raises its own kind for the trap
        torch.cuda.synchronize()
    stopped_after = time.monotonic() - started
    with pytest.raises(PeerTimeoutError):
        made.all_reduce(mine)
    return named_after, stopped_after, text


@READINESS
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", (2, 4))
def test_rank_that_never_arrives(world_size: int, strategy: str, settings: Settings) -> None:
    _check_absent_rank(world_size, strategy, settings)


@pytest.mark.parametrize("world_size", (3, 4))
def test_rank_that_never_arrives_at_stages(world_size: int) -> None:
    _check_absent_rank(world_size, "TWOSHOT", STAGED)


def _check_absent_rank(world_size: int, strategy: str, settings: Settings) -> None:
    pool = RankPool(world_size, "cuda")
    try:
        answers = pool.run(_wait_for_absent_rank, strategy, 3.0, settings)
    finally:
        pool.kill()  # their CUDA contexts are gone
    kernel, phase = ("TWOSHOT", "scatter") if strategy == "TWOSHOT" else ("ONESHOT", "gather")
    for rank, (named_after, stopped_after, text) in enumerate(answers):
        if rank == 0:
            continue
        assert text.startswith(f"rank {rank} waited 3"), text
        assert f"for rank 0 in {kernel}/{phase}" in text, text
        assert 3.0 <= named_after < 3.0 + 5.0, named_after
        assert stopped_after < 3.0 + CONTEXT_END_S, f"CUDA took {stopped_after - named_after:.1f} s to end the context"


def _facts(context: RankContext) -> tuple[str, list[str]]:
    with checks.communicator(context, "AUTO", tuning_profile="none") as group:
        sizes = [str(group.explain((count,), torch.bfloat16).strategy) for count in (1024, 1 << 21)]
        integers = torch.arange(10, device=context.device)
        total = group.all_reduce(integers)
        assert torch.equal(total, integers * context.world_size)
        assert group.report()["calls"] == {"NCCL": 1}
        return str(group.facts.transport), sizes


def test_auto_uses_both_and_integers_go_to_nccl(gpu_pool: PoolFor) -> None:
    for transport, sizes in gpu_pool(2).run(_facts):
        assert transport == "symmetric"
        assert sizes == ["ONESHOT", "TWOSHOT"]


def _ranks_alive(context: RankContext) -> int:
    dist.barrier(group=context.control_group)
    return context.rank


def test_pool_survives(gpu_pool: PoolFor) -> None:
    assert gpu_pool(2).run(_ranks_alive) == [0, 1]
