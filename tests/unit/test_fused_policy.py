"""The norm behind an all-reduce: when it is in the same kernel, and why it is not."""

from __future__ import annotations

import dataclasses

import pytest

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.algorithms.decision import Algorithm, Epilogue
from llm_allreduce_plugin.bench.norm_compare import strategy_in_one_kernel
from llm_allreduce_plugin.profiles import file, search
from llm_allreduce_plugin.quantization import QuantKind
from llm_allreduce_plugin.runtime.tally import fallbacks_of
from llm_allreduce_plugin.selection.policy import decide_fused
from llm_allreduce_plugin.topology.links import Transport
from tests.support.fused_decisions import facts, launch_of, reason_of
from tests.support.group_facts import LANES, config


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
                strategy = strategy_in_one_kernel(group, times.strategy, times.bytes)
                if path.name == "nvidia-h200-x4.json" and strategy != times.strategy:
                    continue  # timed in two steps: tune did not ask for what AUTO runs yet
                decision = decide_fused(config(strategy), group, rows, hidden, "bfloat16")
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
    for rows, algorithm in (
        (13, Algorithm.ONE_SHOT),
        (16, Algorithm.ONE_SHOT),
        (100, Algorithm.TWO_SHOT),
        (4096, Algorithm.TWO_SHOT),
    ):
        launch = decide_fused(config(), facts(4), rows, 8192, "bfloat16").launch
        assert launch is not None
        assert launch.algorithm is algorithm
    for ranks in (5, 8):
        unknown = f"(an estimate from 4 ranks: one kernel or two was not measured for {ranks} ranks)"
        assert (
            reason_of(facts(ranks), 100, 8192) == f"in two steps below 2 MiB two kernels are faster than one {unknown}"
        )
    for rows, strategy in ((17, "AUTO"), (99, "AUTO"), (14, "TWOSHOT")):
        reason = reason_of(facts(4), rows, 8192, strategy=strategy)
        assert reason.startswith("in two steps below 1.562 MiB two kernels are faster than one (one kernel was faster")
    for rows in (100, 295):
        reason = reason_of(facts(3), rows, 8192)
        assert reason.startswith("in two steps below 4.625 MiB two kernels are faster than one (one kernel was faster")
    assert decide_fused(config(), facts(3), 296, 8192, "bfloat16").launch is not None


def test_one_kernel_takes_one_step_a_little_longer_than_the_sum_alone() -> None:
    """With four ranks: its rows are whole everywhere. Two kernels, where it cannot run, sum as ever."""
    decision = decide_fused(config(), facts(4), 16, 8192, "bfloat16")
    alone = decision.all_reduce.launch
    assert decision.launch is not None
    assert alone is not None
    assert (decision.launch.algorithm, alone.algorithm) == (Algorithm.ONE_SHOT, Algorithm.TWO_SHOT)
    assert decide_fused(config(), facts(4), 8, 8192, "float32").all_reduce.launch == alone
    for world_size in (3, 5, 8):  # nobody measured those
        for rows in range(1, 65):
            group = facts(world_size)
            decision = decide_fused(config(), group, rows, 8192, "bfloat16", however_slow=True)
            alone = decision.all_reduce.launch
            assert decision.launch is not None
            assert alone is not None
            assert decision.launch.algorithm is alone.algorithm
    assert launch_of(facts(4), 16, 8192, "TWOSHOT").algorithm is Algorithm.TWO_SHOT
    narrow = facts(4).with_layout(Transport.SYMMETRIC, _C.make_layout(4, LANES, in_band_bytes=2 << 20))
    launch = launch_of(narrow, 16, 8192)
    assert launch.algorithm is Algorithm.ONE_SHOT
    assert launch.rounds == 1


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
