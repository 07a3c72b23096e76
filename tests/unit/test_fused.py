"""The norm behind an all-reduce: when it is in the same kernel, how that is launched, and why it is not."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import _C, AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.algorithms.decision import Algorithm, Epilogue, Exchange, Launch
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.strategies import STRATEGIES
from llm_allreduce_plugin.profiles import file, search
from llm_allreduce_plugin.quantization import QuantKind
from llm_allreduce_plugin.runtime.tally import FUSED, Fallback, Made, Tally, fallbacks_of
from llm_allreduce_plugin.selection.policy import decide, decide_fused
from llm_allreduce_plugin.topology.links import Transport
from tests.support import group_facts

S = AllReduceStrategy
VECTOR_ELEMENTS = 8
LANES = 264  # of an H200


def facts(
    world_size: int,
    transport: Transport = Transport.SYMMETRIC,
    workspace: int = 384 << 20,
    in_band: bool = True,
    architecture: int | None = 90,
) -> GroupFacts:
    """Of a size that GPUs' workspaces have; what ranks share is smaller."""
    shared = transport in (Transport.HOST, Transport.SHM)
    return group_facts.facts(world_size, transport, workspace // 8 if shared else workspace, in_band, architecture)


def config(strategy: str = "AUTO", **settings: Any) -> AllReduceConfig:
    return AllReduceConfig(allreduce_strategy=strategy, **settings)


def launch_of(group: GroupFacts, rows: int, hidden: int, strategy: str = "AUTO") -> Launch:
    """Of one kernel, whether or not it pays."""
    decision = decide_fused(config(strategy), group, rows, hidden, "bfloat16", however_slow=True)
    assert decision.launch is not None, decision.reason
    return decision.launch


def reason_of(group: GroupFacts, rows: int, hidden: int, dtype: str = "bfloat16", **settings: Any) -> str:
    decision = decide_fused(config(**settings), group, rows, hidden, dtype)
    assert decision.launch is None
    return decision.reason


any_facts = st.builds(
    facts,
    world_size=st.sampled_from((2, 3, 4, 7, 8, 9, 16)),
    transport=st.sampled_from(list(Transport)),
    workspace=st.integers(32 << 20, 512 << 20),
    in_band=st.booleans(),
    architecture=st.sampled_from((None, 80, 90, 100, 120)),
)
any_hidden = st.sampled_from((8, 64, 896, 2880, 4096, 5120, 7168, 8192, 16384, 18432)) | st.integers(1, 2304).map(
    lambda units: units * VECTOR_ELEMENTS
)
any_rows = st.integers(0, 64) | st.integers(0, 65536)


def _is_sound(group: GroupFacts, rows: int, hidden: int, launch: Launch) -> None:
    """What the kernels rely on: rows stay whole, fit their slots, and a thread has at most so many vectors."""
    assert launch.epilogue is Epilogue.RMS_NORM
    assert launch.wire_format is None
    if group.transport is Transport.SHM:
        return
    assert launch.exchange is (Exchange.SHARED if group.transport is Transport.HOST else Exchange.PUSH)
    assert group.world_size <= 8
    assert hidden <= 16384
    vectors = hidden // VECTOR_ELEMENTS
    is_one_shot = launch.algorithm is Algorithm.ONE_SHOT
    parts = 1 if is_one_shot else group.world_size
    slot = group.in_band.one_shot if is_one_shot else group.in_band.two_shot
    assert launch.chunk_vectors % vectors == 0
    in_a_round = launch.chunk_vectors // vectors
    assert 1 <= in_a_round <= math.ceil(rows / parts)
    assert launch.chunk_vectors * 16 <= slot
    assert launch.rounds == math.ceil(rows / (in_a_round * parts))
    assert 1 <= launch.lanes <= group.lanes
    assert launch.threads % 32 == 0
    shape = measured.ROW_SHAPES[launch.exchange.name]
    if launch.threads > shape.most_threads:  # a wide block, which has a vector of a row to a thread
        assert (group.world_size, launch.algorithm, launch.cluster) == (2, Algorithm.ONE_SHOT, 1)
        assert vectors <= launch.threads <= min(shape.wide_threads, _C.MAX_WIDE_THREADS)
        assert launch.scatter_lanes == 0
    else:
        assert launch.threads <= _C.MAX_THREADS
    assert math.ceil(vectors / (launch.cluster * launch.threads)) <= max(shape.vectors)
    assert launch.lanes % launch.cluster == 0
    workers = launch.lanes - launch.scatter_lanes - launch.drain_lanes
    assert workers >= 1
    assert launch.cluster <= 8
    assert launch.cluster == 1 or (group.architecture or 0) >= 90
    if launch.scatter_lanes:
        assert launch.cluster == 1
        assert in_a_round >= workers
    else:
        assert launch.drain_lanes == 0
        assert launch.lanes <= in_a_round * launch.cluster
    if launch.exchange is Exchange.SHARED:
        assert (launch.rounds, launch.scatter_lanes, launch.cluster) == (1, 0, 1)
        assert is_one_shot


@given(st.sampled_from(list(S)), any_facts, any_rows, any_hidden, st.sampled_from(("bfloat16", "float32", "int8")))
def test_total_deterministic_sound_and_reasoned(
    strategy: S, group: GroupFacts, rows: int, hidden: int, dtype: str
) -> None:
    decision = decide_fused(config(strategy), group, rows, hidden, dtype)
    assert decision == decide_fused(config(strategy), pickle.loads(pickle.dumps(group)), rows, hidden, dtype)
    assert decision.all_reduce == decide(config(strategy), group, rows * hidden, dtype)
    assert decision.reason
    assert decision.reason in str(decision)
    assert len(decision.counted_as) <= 64, "what a report may hold"
    if decision.launch is not None:
        assert rows > 0
        assert dtype == "bfloat16"
        assert decision.all_reduce.launch is not None
        assert not decision.by_design
        _is_sound(group, rows, hidden, decision.launch)
    if rows == 0:
        assert (decision.launch, decision.by_design) == (None, True)


@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
@pytest.mark.parametrize("hidden", (2880, 4096, 5120, 7168, 8192, 16384))
def test_every_usual_message_on_peers_memory_can_be_fused(world_size: int, hidden: int) -> None:
    group = facts(world_size)
    for rows in (1, 2, 7, 64, 512, 4096, 65536):
        launch = launch_of(group, rows, hidden)
        if world_size == 2:
            assert launch.algorithm is Algorithm.ONE_SHOT
        else:
            alone = decide(config(), group, rows * hidden, "bfloat16").launch
            assert alone is not None
            assert launch.algorithm is alone.algorithm


def test_wide_blocks_take_what_is_not_large() -> None:
    """Of two ranks, a row to a block, a vector to a thread. Of more rows, each block takes two, or one in two waves."""
    group = facts(2)
    for hidden, rows in ((8192, 33), (8192, 132), (5120, 64), (7168, 100)):
        launch = launch_of(group, rows, hidden)
        assert (launch.lanes, launch.cluster, launch.threads) == (rows, 1, hidden // 8)
        assert (launch.scatter_lanes, launch.rounds) == (0, 1)
    for rows, lanes in ((133, 132), (264, 132), (265, 264)):
        launch = launch_of(group, rows, 8192)
        assert (launch.lanes, launch.threads, launch.scatter_lanes) == (lanes, 1024, 0)
    assert launch_of(group, 512, 8192).threads == 512, "a large message"
    assert launch_of(group, 64, 4096).threads == 512, "which is a vector to a thread, too"
    assert launch_of(group, 64, 8200).threads <= 512
    for other in (facts(3), facts(4), facts(2, architecture=80), facts(2, architecture=None)):
        assert launch_of(other, 64, 8192).threads <= 512


def test_few_rows_are_shared_by_a_cluster() -> None:
    """Smaller ones the more rows there are, none where rows are short or nothing has clusters."""
    group = facts(2)
    one = launch_of(group, 1, 8192)
    assert (one.lanes, one.cluster, one.threads) == (8, 8, 128)
    assert "(8 to a row)" in str(one)
    clusters = [launch_of(group, rows, 8192).cluster for rows in (4, 5, 16, 17, 32, 33, 256)]
    assert clusters == [8, 4, 4, 1, 1, 1, 1]
    assert [launch_of(group, rows, 8192).threads for rows in (17, 32)] == [1024, 1024]
    assert [launch_of(group, rows, 16384).cluster for rows in (4, 5, 64, 65, 128)] == [8, 4, 4, 2, 2]
    assert [launch_of(group, rows, 4096).cluster for rows in (1, 16, 17)] == [4, 4, 1]
    assert launch_of(group, 1, 2880).cluster == 1, "too short a row"
    assert launch_of(facts(2, architecture=80), 1, 8192).cluster == 1
    assert launch_of(facts(2, architecture=None), 1, 8192).cluster == 1
    assert launch_of(facts(2, Transport.HOST), 1, 8192).cluster == 1


def test_a_block_has_as_few_vectors_to_a_thread_as_it_can() -> None:
    """By hidden size: threads through peers' memory, and through host memory."""
    for hidden, pushed, shared in (
        (64, 32, 32),
        (2880, 384, 192),
        (4096, 512, 256),
        (4104, 288, 160),
        (8192, 512, 256),
    ):
        assert launch_of(facts(2, architecture=80), 16, hidden).threads == pushed
        assert launch_of(facts(2, Transport.HOST), 4, hidden).threads == shared


def test_a_row_that_is_more_than_a_block_holds_is_shared() -> None:
    for world_size, rows, cluster in ((2, 16, 4), (2, 4096, 2), (4, 512, 2), (2, 1, 8)):
        launch = launch_of(facts(world_size), rows, 16384)
        own = rows if world_size == 2 else rows // 4
        assert (launch.cluster, launch.scatter_lanes) == (cluster, 0)
        assert launch.lanes == min(LANES, cluster * own)
        assert launch.threads == min(512, 2048 // cluster)
    assert launch_of(facts(2), 300, 8200).cluster == 2


def test_large_messages_give_lanes_one_task_each() -> None:
    assert launch_of(facts(2), 127, 8192).scatter_lanes == 0
    assert launch_of(facts(2), 511, 8192).scatter_lanes == 0
    # As many warps push whatever a block has, by GPU; a multiprocessor holds two small blocks.
    for hidden, threads, lanes, pushing in (
        (2880, 192, 264, {"H200": 74, "H100": 85}),
        (4096, 256, 264, {"H200": 56, "H100": 64}),
        (5120, 320, 132, {"H200": 44, "H100": 51}),
        (7168, 448, 132, {"H200": 32, "H100": 36}),
        (8192, 512, 132, {"H200": 28, "H100": 32}),
    ):
        for name, scatter in {"": pushing["H200"], **pushing}.items():
            group = dataclasses.replace(facts(2), gpu_name=f"NVIDIA {name} 80GB HBM3")
            pushed = launch_of(group, (8 << 20) // (2 * hidden) + 1, hidden)
            assert (pushed.threads, pushed.lanes, pushed.scatter_lanes) == (threads, lanes, scatter)
            assert pushed.drain_lanes == 0
    both = launch_of(facts(4), 4096, 8192)
    assert (both.threads, both.lanes, both.scatter_lanes, both.drain_lanes) == (512, 132, 16, 76)
    assert launch_of(facts(4), 128, 8192).scatter_lanes == 0, "fewer rows than lanes that would sum"
    assert launch_of(facts(2), 264, 4096).scatter_lanes == 0, "short rows, a lane for each"
    by_turns = launch_of(facts(2), 265, 4096)
    assert (by_turns.threads, by_turns.lanes, by_turns.scatter_lanes) == (256, 264, 0), "two vectors to a thread"


def test_rows_of_a_two_shot_belong_to_ranks() -> None:
    launch = launch_of(facts(4), 30, 8192, "TWOSHOT")
    assert launch.algorithm is Algorithm.TWO_SHOT
    assert (launch.chunk_vectors, launch.lanes, launch.rounds) == (8 * 1024, 8 * launch.cluster, 1)
    few = launch_of(facts(8), 3, 8192, "TWOSHOT")
    assert (few.chunk_vectors, few.lanes) == (1024, few.cluster)


def test_messages_beyond_a_slot_take_rounds_of_whole_rows() -> None:
    group = facts(2, workspace=32 << 20)
    launch = launch_of(group, 4096, 7168)
    assert launch.rounds > 1
    assert launch.chunk_vectors % 896 == 0


def test_why_not() -> None:
    pushes = facts(4)
    assert reason_of(pushes, 8, 8192, fuse_norm=False) == "fuse_norm is off"
    assert reason_of(pushes, 0, 8192) == "there are no rows"
    assert reason_of(pushes, 8, 8192, "float32") == "only 16-bit types are fused, not float32"
    assert reason_of(pushes, 8, 18432) == "a row of 18432 elements is more than a fused kernel takes, 16384"
    assert reason_of(pushes, 8, 8192, strategy="NCCL") == "the engine's own all-reduce runs"
    assert reason_of(facts(4, Transport.NONE), 8, 8192) == "the engine's own all-reduce runs"
    assert reason_of(facts(9), 8, 8192) == "there are fused kernels for 2 to 8 ranks, not for 9"
    flagged = "only what travels in band is fused, and this message is flagged"
    assert reason_of(facts(4, in_band=False), 8, 8192) == flagged
    assert reason_of(facts(4, Transport.HOST), 4096, 8192) == flagged
    assert reason_of(facts(4, Transport.HOST), 8, 8192) == "through host memory only one-shot is fused"
    assert (
        reason_of(facts(2, Transport.HOST), 1, 8200) == "a row of 8200 elements is more than a block holds here, 8192"
    )
    assert (
        reason_of(facts(4, architecture=80), 8, 16384)
        == "a row of 16384 elements is more than a block holds here, 8192"
    )
    narrow = facts(8).with_layout(Transport.SYMMETRIC, _C.make_layout(8, LANES, in_band_bytes=256 << 10))
    assert "does not fit a slot of" in reason_of(narrow, 8, 16384, strategy="ONESHOT")
    compressed = decide_fused(config("LOWPRECISION", low_precision={"min_bytes": 0}), pushes, 4096, 8192, "bfloat16")
    assert compressed.reason == "only exact sums are fused, and this one is compressed on the wire"
    assert launch_of(pushes, 8, 8192, "LOWPRECISION").algorithm is Algorithm.ONE_SHOT, "too small to compress"
    staged = dataclasses.replace(facts(4), nvlink=False)
    layout = _C.make_layout(4, LANES, in_band_bytes=96 << 20, flagged_bytes=288 << 20)
    staged = staged.with_layout(Transport.SYMMETRIC, layout)
    assert reason_of(staged, 4096, 8192) == "only what travels in band is fused, and this message is staged"


def test_reasons_say_what_was_measured() -> None:
    """And for which group: others are told that nobody knows."""
    known = "fuse_norm is on; one kernel was faster than two from 16 KiB to 64 MiB (2 H200, 2 H100, rows of 8192)"
    for rows, hidden in ((1, 4096), (64, 5120), (1024, 8192)):
        decision = decide_fused(config(), facts(2), rows, hidden, "bfloat16")
        assert decision.reason == f"{known}; over 2 ranks one step sends no more than two"
    for group, unknown in (
        (
            facts(3),
            "fuse_norm is on; one kernel was faster than two in one step to 512 KiB and in two from 4.625 MiB on "
            "(3 H200, rows of 8192)",
        ),
        (facts(5), "fuse_norm is on; one kernel or two was not measured for 5 ranks"),
        (facts(2, Transport.SHM), "fuse_norm is on"),
    ):
        assert decide_fused(config(), group, 1, 8192, "bfloat16").reason == unknown


@pytest.mark.parametrize("strategy", ("AUTO", "MINLATENCY", "ONESHOT"))
def test_through_host_memory_two_kernels_are_faster(strategy: str) -> None:
    """As the profiles measured it that ship with the package; by name or without a profile, too."""
    two, four = (
        "through host memory two kernels are faster than one (5.51 us against 6.88 at 16 KiB, 17.4 against 18.6 at "
        "256 KiB: 2 H100, rows of 8192)",
        "through host memory two kernels are faster than one (6.13 us against 10.1 at 16 KiB, 10.6 against 12.9 at "
        "64 KiB: 4 H200, rows of 8192)",
    )
    nobody = (
        "through host memory two kernels are faster than one (an estimate from 2 and 4 ranks: one kernel or two was "
        "not measured for {} ranks through host memory)"
    )
    for ranks, reason in ((2, two), (3, nobody.format(3)), (4, four), (8, nobody.format(8))):
        for rows, hidden in ((1, 4096), (1, 8192)):
            decision = decide_fused(config(strategy), facts(ranks, Transport.HOST), rows, hidden, "bfloat16")
            assert (decision.launch, decision.by_design, decision.reason) == (None, True, reason)
            assert fallbacks_of(decision) == ()
    assert launch_of(facts(2, Transport.HOST), 16, 8192, strategy).epilogue is Epilogue.RMS_NORM, "one is possible"


def test_shipped_profiles_and_the_numbers_without_one_agree() -> None:
    """Where a profile measured one kernel and two, of 16-bit rows: the same choice, but for differences below 2.5 %."""
    compared = set()
    for path in search.shipped_paths():
        for entry in file.read(path).entries:
            if entry.fused is None:
                continue
            group = facts(entry.world_size, entry.transport, workspace=512 << 20)
            for times in entry.fused.measured:
                one, two = (times.graph_us[runs] for runs in ("fused", "then-norm"))
                rows, hidden = times.bytes // 2 // entry.fused.hidden, entry.fused.hidden
                decision = decide_fused(config(times.strategy), group, rows, hidden, "bfloat16")
                if abs(one / two - 1) > 0.025:
                    assert (decision.launch is not None) == (one < two), f"{path.name}: {entry}: {times}"
                    compared.add((path.name, entry.world_size, entry.transport))
    assert len(compared) >= 5


def test_where_it_does_not_pay_two_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    among = (Transport.SYMMETRIC, "ONE_SHOT")
    monkeypatch.setitem(measured.FUSED_PAYS, among, {2: (0, 1 << 20), 8: (0, None)})
    assert launch_of(facts(2), 64, 8192).algorithm is Algorithm.ONE_SHOT
    assert reason_of(facts(2), 65, 8192).startswith("above 1 MiB two kernels are faster than one (")


def test_few_rows_in_two_steps_take_two_kernels() -> None:
    """With more than two ranks, as measured with four."""
    for rows, algorithm in ((12, Algorithm.ONE_SHOT), (128, Algorithm.TWO_SHOT), (4096, Algorithm.TWO_SHOT)):
        launch = decide_fused(config(), facts(4), rows, 8192, "bfloat16").launch
        assert launch is not None
        assert launch.algorithm is algorithm
    for ranks in (5, 8):
        unknown = f"(an estimate from 4 ranks: one kernel or two was not measured for {ranks} ranks)"
        assert (
            reason_of(facts(ranks), 100, 8192) == f"in two steps below 2 MiB two kernels are faster than one {unknown}"
        )
    for rows in (13, 127):
        reason = reason_of(facts(4), rows, 8192)
        assert reason.startswith("in two steps below 2 MiB two kernels are faster than one (one kernel was faster")
    for rows in (100, 295):
        reason = reason_of(facts(3), rows, 8192)
        assert reason.startswith("in two steps below 4.625 MiB two kernels are faster than one (one kernel was faster")
    assert decide_fused(config(), facts(3), 296, 8192, "bfloat16").launch is not None


@pytest.mark.parametrize(
    ("hidden", "quant", "multiple"),
    [
        (0, None, 8),
        (12, None, 8),
        (2884, QuantKind.FP8, 8),
        (24, QuantKind.NVFP4, 16),
        (2880, QuantKind.FP8_GROUP, 128),
    ],
)
def test_rows_that_cannot_be_normed_are_refused(hidden: int, quant: QuantKind | None, multiple: int) -> None:
    with pytest.raises(ValueError, match=f"rows of {hidden} elements; .* needs a multiple of {multiple}"):
        decide_fused(config(), facts(2), 4, hidden, "bfloat16", quant)


def test_quantization_makes_no_difference_to_the_launch() -> None:
    plain = decide_fused(config(), facts(2), 16, 8192, "bfloat16")
    assert all(decide_fused(config(), facts(2), 16, 8192, "bfloat16", quant) == plain for quant in QuantKind)


def test_cpu_ranks_fuse_what_they_run() -> None:
    for strategy in ("ONESHOT", "TWOSHOT"):
        launch = launch_of(facts(2, Transport.SHM), 16, 8192, strategy)
        alone = STRATEGIES[S(strategy)].plan(config(strategy), facts(2, Transport.SHM), _message(16 * 8192))
        assert alone is not None
        assert launch == dataclasses.replace(alone, epilogue=Epilogue.RMS_NORM)


def _message(count: int) -> Any:
    from llm_allreduce_plugin.algorithms.base import Message

    return Message(count, "bfloat16", 2)


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_names() -> None:
    group = facts(2)

    def name(strategy: str, rows: int = 8, **settings: Any) -> str:
        return decide_fused(config(strategy, **settings), group, rows, 8192, "bfloat16").counted_as

    assert name("AUTO") == "ONESHOT (fused norm)"
    assert name("AUTO", 256) == "ONESHOT (fused norm)", "its kernel, where the sum alone would be two-shot"
    assert name("TWOSHOT") == "ONESHOT (fused norm)"
    assert name("MINLATENCY") == "MINLATENCY (fused norm)"
    assert name("MINLATENCY", fuse_norm=False) == "MINLATENCY, then norm"
    assert name("NCCL") == "NCCL, then norm"


def test_what_is_not_fused_is_counted_with_the_reason() -> None:
    tally = Tally()
    fused = decide_fused(config("ONESHOT"), facts(2), 8, 8192, "bfloat16")
    other = decide_fused(config("ONESHOT"), facts(2), 8, 8192, "float32")
    tally.add(fused, Made(calls=3, captured=1))
    tally.add(other, Made(captured=2))
    counts = tally.counts()
    assert counts.calls == {"ONESHOT (fused norm)": 3, "ONESHOT, then norm": 0}
    assert counts.captured == {"ONESHOT (fused norm)": 1, "ONESHOT, then norm": 2}
    reason = "only 16-bit types are fused, not float32"
    assert counts.fallbacks == {Fallback(FUSED, "ONESHOT, then norm", reason): 2}
    assert counts.fields()["fallbacks"] == {"fused norm -> ONESHOT, then norm": reason}


def test_the_sums_own_fallback_comes_first_and_what_nobody_asked_for_is_none() -> None:
    to_engine = decide_fused(config("ONESHOT"), facts(2, Transport.NONE), 8, 8192, "bfloat16")
    assert fallbacks_of(to_engine) == (Fallback("ONESHOT", "NCCL", "a test says so"),)
    unwritten = decide_fused(config("UB", registered_pool=0), facts(4), 8, 8192, "float32")
    assert [found.requested for found in fallbacks_of(unwritten)] == ["UB", FUSED]
    for nothing in (
        decide_fused(config("NCCL"), facts(2), 8, 8192, "bfloat16"),
        decide_fused(config("ONESHOT", fuse_norm=False), facts(2), 8, 8192, "bfloat16"),
        decide_fused(config("ONESHOT"), facts(2), 0, 8192, "bfloat16"),
    ):
        assert fallbacks_of(nothing) == ()
