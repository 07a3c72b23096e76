"""UB: which messages it takes, and the memory that outputs lie in."""

from __future__ import annotations

import dataclasses
import gc
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_allreduce_plugin import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.ranges import Range, Tuned, TunedRanges
from llm_allreduce_plugin.algorithms.user_buffer import memory_in_words, pool_bytes, sizes_placed
from llm_allreduce_plugin.group.start_log import log_start
from llm_allreduce_plugin.runtime.tally import fallback_of
from llm_allreduce_plugin.selection.policy import decide, decide_fused, describe
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.registered import ALIGNMENT, RegisteredPool
from tests.support.group_facts import any_facts, config, facts

S = AllReduceStrategy
MIB = 1 << 20


def pool_of(size: int, largest: int) -> RegisteredPool:
    storage = torch.empty(size + 4096, dtype=torch.uint8)
    start = -storage.data_ptr() % 4096
    storage = storage[start : start + size]
    return RegisteredPool(storage, [storage.data_ptr()], None, largest)


# -- the policy --------------------------------------------------------------------------------------------------------


def test_large_messages_are_placed_and_small_ones_left_to_two_shot() -> None:
    group = facts(4, in_band=True)
    for size in (4 * MIB, 16 * MIB, 128 * MIB):
        decision = decide(config("UB"), group, size // 2, "bfloat16")
        assert (decision.strategy, decision.is_fallback, decision.counted_as) == (S.UB, False, "UB")
        assert decision.launch is not None
        assert (decision.launch.algorithm, decision.launch.exchange) == (Algorithm.TWO_SHOT, Exchange.PLACE)
        assert (0 < decision.launch.scatter_lanes < decision.launch.lanes) == (size > 8 * MIB), "where lanes share"
        assert decision.launch.drain_lanes == 0
        assert decision.launch.chunk_vectors * 16 <= group.in_band.two_shot
    small = decide(config("UB"), group, MIB, "bfloat16")
    assert (small.strategy, small.by_design, small.is_fallback) == (S.TWOSHOT, True, False)
    assert small.reason == "below 4 MiB results travel as fast through slots (an estimate)"
    large = decide(config("UB", registered_pool="64MiB"), group, 8 * MIB + 1, "bfloat16")
    assert (large.strategy, large.is_fallback) == (S.TWOSHOT, True)
    assert large.reason == "messages above 16 MiB, a quarter of registered_pool, go through slots"
    larger = decide(config("UB", registered_pool="64MiB"), group, 64 * MIB, "bfloat16")
    assert fallback_of(larger) == fallback_of(large), "one warning and one label, whatever the size"


def test_over_two_gpus_one_step_runs() -> None:
    """Whatever the size and wherever the output lies: that is no fallback."""
    group = facts(2, in_band=True)
    for size in (16, 8 * MIB, 1 << 30):
        for registered in (None, True, False):
            decision = decide(config("UB"), group, size // 2, "bfloat16", registered_output=registered)
            assert (decision.strategy, decision.is_fallback, decision.by_design) == (S.ONESHOT, False, True)
            assert decision.reason == measured.ONE_STEP_INSTEAD
    assert describe(config("UB"), group) == "ONESHOT at every size"
    flagged = decide(config("UB", in_band=False), facts(2), 8 * MIB, "bfloat16")
    assert (flagged.strategy, flagged.is_fallback) == (S.TWOSHOT, True), "which is faster there"
    assert "in_band is off" in flagged.reason


def test_an_output_of_the_callers_must_lie_there() -> None:
    group = facts(3, in_band=True)
    elsewhere = decide(config("UB"), group, 8 * MIB, "bfloat16", registered_output=False)
    assert (elsewhere.strategy, elsewhere.is_fallback) == (S.TWOSHOT, True)
    assert elsewhere.reason == "its output does not lie in registered memory"
    assert decide(config("UB"), group, 8 * MIB, "bfloat16", registered_output=True).strategy is S.UB


@pytest.mark.parametrize(("world_size", "name"), [(2, "ONESHOT (fused norm)"), (4, "TWOSHOT (fused norm)")])
def test_in_one_kernel_with_the_norm_the_sum_is_no_output(world_size: int, name: str) -> None:
    group = facts(world_size, in_band=True, architecture=90)
    fused = decide_fused(config("UB"), group, 4096, 8192, "bfloat16")
    assert fused.launch is not None
    assert (fused.launch.exchange, fused.counted_as) == (Exchange.PUSH, name)
    two = decide_fused(config("UB", fuse_norm=False), group, 4096, 8192, "bfloat16")
    assert (two.launch, two.counted_as) == (None, "ONESHOT, then norm" if world_size == 2 else "UB, then norm")


def test_the_log_says_from_which_size_on() -> None:
    assert describe(config("UB"), facts(4, in_band=True)) == "TWOSHOT to 2 MiB, UB to 128 MiB, then TWOSHOT"
    assert describe(config("UB"), facts(transport=Transport.SHM)) == "UB to 4 MiB, then TWOSHOT"


def test_the_log_says_where_outputs_lie(caplog: pytest.LogCaptureFixture) -> None:
    """And over two GPUs that there is no such memory, because one step runs."""
    two, four = facts(2, in_band=True), facts(4, in_band=True)
    said = "UB takes outputs from registered memory, 536870912 bytes on each rank"
    assert memory_in_words(config("UB", fuse_norm=False), four) == said
    fused = decide_fused(config("UB"), four, 4096, 8192, "bfloat16")
    assert fused.counted_as == "TWOSHOT (fused norm)"
    assert memory_in_words(config("UB"), four) == (
        f"{said}. Sums with their norm in the same kernel (fuse_norm) are no outputs, and run as TWOSHOT"
    )
    one_step = "UB takes one step over 2 GPUs, as ONESHOT does, and stores into no outputs of others. "
    one_step += "Registered memory: "
    assert memory_in_words(config("UB"), two) == f"{one_step}none is opened"
    asked = memory_in_words(config("UB", registered_pool="1M"), two)
    assert asked == f"{one_step}1048576 bytes, for registered_empty alone"
    assert memory_in_words(config("UB", registered_pool=0), four) == "", "the first call says why it cannot run"
    assert memory_in_words(config("TWOSHOT", registered_pool="1M"), four) == ""
    caplog.set_level("INFO")
    log_start(config("UB"), two, describe(config("UB"), two))
    assert f"{one_step}none is opened" in caplog.messages


@pytest.mark.parametrize("strategy", ["AUTO", "MINLATENCY"])
def test_tables_choose_it_only_where_it_was_measured(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group, with_pool = facts(4, in_band=True), config(strategy, registered_pool="512MiB")
    before = decide(with_pool, group, 8 * MIB, "bfloat16").launch
    assert before is not None
    assert before.exchange is Exchange.PUSH
    monkeypatch.setitem(measured.TABLE_PLACES_FROM, 4, 16 * MIB)
    decision = decide(with_pool, group, 8 * MIB, "bfloat16")
    assert decision.launch is not None
    assert decision.launch.exchange is Exchange.PLACE
    assert decision.strategy == ("UB" if strategy == "AUTO" else "MINLATENCY")
    assert "stored into registered outputs were faster from 16 MiB on" in decision.reason
    assert decision.numerics == decide(config("TWOSHOT"), group, 8 * MIB, "bfloat16").numerics
    for other in (
        decide(with_pool, group, 8 * MIB - 1, "bfloat16"),
        decide(with_pool, group, 8 * MIB, "bfloat16", registered_output=False),
        decide(config(strategy), group, 8 * MIB, "bfloat16"),
        decide(with_pool, facts(2, in_band=True), 8 * MIB, "bfloat16"),
    ):
        assert other.launch is not None
        assert other.launch.exchange is Exchange.PUSH


PROFILE = (Range(MIB, "ONESHOT"), Range(8 * MIB, "UB"), Range(16 * MIB, "TWOSHOT"), Range(None, "UB"))


def tuned(group: GroupFacts, registered: tuple[Range, ...] = PROFILE) -> GroupFacts:
    """With a profile, by which all that is not placed takes one step."""
    said = TunedRanges(2, (Range(None, "ONESHOT"),), registered=registered)
    return dataclasses.replace(group, tuned=Tuned("a profile", (said,)))


@pytest.mark.parametrize("strategy", ["AUTO", "MINLATENCY"])
def test_a_profile_chooses_it_for_registered_outputs_alone(strategy: str) -> None:
    """Where it does not say so, or the output is another, the other table decides."""
    group, with_pool = tuned(facts(4, in_band=True)), config(strategy, registered_pool="512MiB")
    for size in (2 * MIB, 8 * MIB, 32 * MIB):
        for registered in (None, True):
            decision = decide(with_pool, group, size // 2, "bfloat16", registered_output=registered)
            assert decision.launch is not None
            assert decision.launch.exchange is Exchange.PLACE
            assert decision.strategy == ("UB" if strategy == "AUTO" else "MINLATENCY")
            assert "where results stored into registered outputs were fastest (a profile)" in decision.reason
            assert not decision.is_fallback
            assert decision.numerics == decide(config("TWOSHOT"), group, size // 2, "bfloat16").numerics
    for settings_, of, size, registered in (
        (with_pool, group, MIB, True),
        (with_pool, group, 16 * MIB, True),
        (with_pool, group, 2 * MIB, False),
        (with_pool, group, 256 * MIB, True),  # more than a quarter of the pool
        (config(strategy), group, 2 * MIB, None),
        (with_pool, tuned(facts(4, in_band=True), ()), 2 * MIB, True),
        (with_pool, tuned(facts(2, in_band=True)), 2 * MIB, True),  # one step
        (with_pool, tuned(dataclasses.replace(group, no_pool_reason="a test says so")), 2 * MIB, None),
        (with_pool, tuned(dataclasses.replace(group, hosts=(0, 0, 1, 1), fabric=True)), 2 * MIB, True),
    ):
        other = decide(settings_, of, size // 2, "bfloat16", registered_output=registered)
        assert other.launch is not None
        assert (other.launch.algorithm, other.launch.exchange) == (Algorithm.ONE_SHOT, Exchange.PUSH)
        assert "like all sizes, where one step beats two (a profile)" in other.reason
        assert other.strategy == ("ONESHOT" if strategy == "AUTO" else "MINLATENCY")


def test_a_setting_comes_before_what_a_profile_says_of_registered_outputs() -> None:
    group = tuned(facts(4, in_band=True))
    asked = config("AUTO", registered_pool="512MiB", one_shot_max_bytes=1024)
    assert decide(asked, group, MIB, "bfloat16").strategy is S.TWOSHOT


def test_what_speaks_against_it_is_the_profile() -> None:
    """And the log names every size at which it changes."""
    group, with_pool = tuned(facts(4, in_band=True)), config("AUTO", registered_pool="512MiB")
    passed_over = {found.strategy: found.reason for found in decide(with_pool, group, 6 * MIB, "bfloat16").passed_over}
    assert passed_over[S.UB] == (
        "12 MiB are within 16 MiB and more than 8 MiB, where results travel faster through slots (a profile)"
    )
    said = describe(with_pool, group)
    assert said == "ONESHOT to 1 MiB, UB to 8 MiB, ONESHOT to 16 MiB, UB to 128 MiB, then ONESHOT"


@given(
    any_facts, st.sampled_from(["AUTO", "MINLATENCY"]), st.integers(0, 1 << 28), st.sampled_from([None, True, False])
)
def test_no_profile_places_where_there_is_no_memory(
    group: GroupFacts, strategy: str, count: int, registered: bool | None
) -> None:
    for settings_ in (config(strategy), config(strategy, registered_pool="64MiB")):
        launch = decide(settings_, group, count, "bfloat16", registered_output=registered).launch
        if launch is not None and launch.exchange is Exchange.PLACE:
            assert pool_bytes(settings_, group) > 0
            assert registered is not False
            assert 2 * count <= 16 * MIB


def test_tuning_measures_what_it_takes_by_name() -> None:
    assert sizes_placed(config("AUTO", registered_pool="64MiB"), facts(4, in_band=True)) == (4 * MIB, 16 * MIB)
    assert sizes_placed(config("AUTO", registered_pool="64MiB"), facts(transport=Transport.SHM)) == (0, 16 * MIB)
    for none in (
        sizes_placed(config("AUTO"), facts(4, in_band=True)),
        sizes_placed(config("AUTO", registered_pool="64MiB"), facts(2, in_band=True)),
        sizes_placed(config("AUTO", registered_pool="64MiB"), facts(transport=Transport.HOST)),
    ):
        assert none is None


def test_there_is_memory_only_where_it_is_wanted_and_of_use() -> None:
    group = facts(3, in_band=True)
    assert pool_bytes(config("UB"), group) == 512 * MIB
    assert pool_bytes(config("UB"), facts(2, in_band=True)) == 0, "one step"
    assert pool_bytes(config("UB", registered_pool="1GiB"), facts(2, in_band=True)) == 1 << 30
    assert pool_bytes(config("AUTO"), group) == 0
    assert pool_bytes(config("AUTO", registered_pool="1GiB"), group) == 1 << 30
    assert pool_bytes(config("UB"), facts(transport=Transport.SHM)) == 16 * MIB
    for other in (
        facts(transport=Transport.HOST),
        facts(transport=Transport.NONE),
        dataclasses.replace(group, hosts=(0, 1)),
        dataclasses.replace(group, no_pool_reason="a test says so"),
    ):
        assert pool_bytes(config("UB"), other) == 0


@pytest.mark.parametrize("value", [-1, "1T", "64MB", True])
def test_a_wrong_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="registered_pool"):
        AllReduceConfig(registered_pool=value)  # type: ignore[arg-type]


# -- the memory --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 1 << 32))
def test_tensors_never_share_bytes_and_all_come_back(seed: int) -> None:
    generator = random.Random(seed)
    pool = pool_of(64 * ALIGNMENT, 16 * ALIGNMENT)
    kept: list[tuple[torch.Tensor, int]] = []
    for number in range(60):
        tensor = pool.take((generator.randrange(1, 5000),), torch.uint8)
        if tensor is None:
            assert kept, "nothing lives, so something must be free"
        else:
            assert pool.holds(tensor)
            assert (tensor.data_ptr() - pool.bases[0]) % ALIGNMENT == 0
            tensor.fill_(number)
            kept.append((tensor, number))
        assert all(bool((found == value).all()) for found, value in kept)
        while kept and generator.random() < 0.45:
            found, value = kept.pop(generator.randrange(len(kept)))
            if generator.random() < 0.3:
                kept.append((found[len(found) // 2 :], value))  # a view keeps all of it
            del found
    kept.clear()
    tensor = None
    whole = pool.take((48 * ALIGNMENT,), torch.uint8)
    assert whole is not None, "all that was taken is one block again"
    assert pool.take((1,), torch.uint8) is None
    # What is lent lies behind it, always at the same place.
    lent = pool.lend((16 * ALIGNMENT,), torch.uint8, stream=5)
    assert lent.data_ptr() == whole.data_ptr() + 48 * ALIGNMENT


def test_what_a_graph_has_taken_stays_with_it() -> None:
    """A replay writes there, whatever lives then: neither eager calls nor other graphs get those bytes."""
    pool = pool_of(8 * ALIGNMENT, 0)
    of_graph = pool.take((2 * ALIGNMENT,), torch.uint8, capture=7)
    assert of_graph is not None
    first = of_graph.data_ptr()
    del of_graph
    again = pool.take((2 * ALIGNMENT,), torch.uint8, capture=7)
    assert again is not None
    assert again.data_ptr() == first, "the same graph uses it by turns"
    del again
    taken = [pool.take((ALIGNMENT,), torch.uint8) for _ in range(7)]
    live = [tensor for tensor in taken if tensor is not None]
    assert len(live) == 6
    assert first not in [tensor.data_ptr() for tensor in live]
    taken.clear()
    live.clear()
    gc.collect()
    other = pool.take((2 * ALIGNMENT,), torch.uint8, capture=8)
    assert other is not None
    assert other.data_ptr() != first
    assert pool.take((1,), torch.uint8, capture=8) is None, "graphs keep half at the most"
    assert pool.take((1,), torch.uint8) is not None


def test_graphs_of_one_memory_pool_take_turns() -> None:
    pool = pool_of(8 * ALIGNMENT, 0)
    pool.graphs_share = True
    places = []
    for capture in (7, 8, 9):
        tensor = pool.take((3 * ALIGNMENT,), torch.uint8, capture)
        assert tensor is not None
        places.append(tensor.data_ptr())
        assert pool.take((2 * ALIGNMENT,), torch.uint8, capture) is None
        del tensor
    assert len(set(places)) == 1
    eager = pool.take((5 * ALIGNMENT,), torch.uint8)
    assert eager is not None
    assert pool.take((1,), torch.uint8) is None, "what graphs have taken is no eager call's"


def test_another_stream_waits_until_what_was_lent_has_been_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of captured calls it is the same capture's; on the stream that had it nobody waits."""
    pool = pool_of(8 * ALIGNMENT, 4 * ALIGNMENT)
    pool.device = torch.device("cuda", 0)
    here, done = [0], list[tuple[str, int, int]]()

    class Event:
        made = 0

        def __init__(self) -> None:
            Event.made += 1
            self.number = Event.made

        def record(self, stream: int) -> None:
            done.append(("recorded", self.number, stream))

        def wait(self, stream: int) -> None:
            done.append(("waited for", self.number, stream))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: here[0])

    def call(stream: int, capture: int = 0) -> list[tuple[str, int, int]]:
        here[0] = stream
        done.clear()
        pool.lend((8,), torch.float32, stream, capture)
        pool.copied(capture)
        return list(done)

    assert call(1) == [("recorded", 1, 1)]
    assert call(1) == [("recorded", 1, 1)]
    assert call(2, capture=5) == [("recorded", 2, 2)], "a replay is ordered by who replays"
    assert call(3, capture=5) == [("waited for", 2, 3), ("recorded", 3, 3)]
    assert call(3, capture=6) == [("recorded", 4, 3)]
    assert call(2) == [("waited for", 1, 2), ("recorded", 1, 2)]
    assert call(1) == [("waited for", 1, 1), ("recorded", 1, 1)]
    assert pool.lent == 7


def test_only_whole_outputs_are_held() -> None:
    pool = pool_of(16 * ALIGNMENT, 4 * ALIGNMENT)
    tensor = pool.take((1000,), torch.float32)
    assert tensor is not None
    held = {"all": tensor, "aligned": tensor[4:], "odd": tensor[1:], "strided": tensor[::2], "none": tensor[:0]}
    assert [name for name, found in held.items() if pool.holds(found)] == ["all", "aligned"]
    assert not pool.holds(torch.empty(1000))
