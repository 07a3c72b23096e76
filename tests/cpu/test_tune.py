"""llm-allreduce tune as a user runs it, on CPU ranks; and groups that go by what it wrote."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from llm_allreduce_plugin import AllReduceConfig, ConfigError
from llm_allreduce_plugin.bench import compare, norm_compare, worker
from llm_allreduce_plugin.bench.candidates import Bound, OurSettings
from llm_allreduce_plugin.bench.compare import Comparison, Effort
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.cli import tune as tune_command
from llm_allreduce_plugin.measure.environment import commit
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.norm import Normed
from llm_allreduce_plugin.profiles import file as profiles
from llm_allreduce_plugin.runtime.norm_calls import NormCall, NormShape
from llm_allreduce_plugin.topology import NodeIdentity
from llm_allreduce_plugin.tuning.fused import FusedTuner
from llm_allreduce_plugin.tuning.measure import KERNELS
from llm_allreduce_plugin.tuning.plan import WrongAnswerError
from tests.conftest import PoolFor
from tests.support import checks, norm_checks
from tests.support.profiles import CHANGING, cpu_entry, fused, registered
from tests.support.reference import assert_same_bits, rank_ordered_sum

RUNNER = CliRunner()


def _start(context: RankContext, settings: dict[str, Any]) -> tuple[list[str], str]:
    """What the first rank logs at start, and why a message of 4 KiB runs as it does."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler()
    logger = logging.getLogger("llm_allreduce_plugin")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with checks.communicator(context, "AUTO", **settings) as group:
            return lines, group.explain((2048,), torch.bfloat16).reason
    finally:
        logger.removeHandler(handler)


def test_tune_and_what_uses_it(cpu_pool: PoolFor, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    flags = ["--cpu", "--quick", "--tp", "2", "-b", "1K", "-e", "64K", "--output", str(path)]
    result = RUNNER.invoke(app, ["tune", *flags])
    assert result.exit_code == 0, result.output
    assert "2 ranks, shm memory, 16-bit elements" in result.output
    assert f"{path} has 1 entries now" in result.output
    (made,) = profiles.read(path).entries
    assert {1024, 4096, 16384, 65536} <= {row.bytes for row in made.measured}
    assert all(time > 0 for row in made.measured for time in row.eager_us.values())
    assert made.environment["torch"] == torch.__version__
    assert made.environment.get("commit", "") == commit()
    assert made.registered is None
    assert all(set(row.eager_us) <= set(KERNELS) for row in made.measured)
    assert made.fused is not None
    assert made.fused.hidden == 8192
    assert {16384, 65536} <= {row.bytes for row in made.fused.measured}
    for row in made.fused.measured:
        assert set(row.eager_us) == {"fused", "then-norm"}
        assert all(time > 0 for time in row.eager_us.values())
    assert "# with residual and norm behind the sum, in one kernel or in two (rows of 8192):" in result.output
    (lines, reason), (others, same) = cpu_pool(2).run(_start, {"tuning_profile": str(path)})
    assert f"these sizes come from profile {path}, measured {made.date[:10]} in eager calls" in lines
    assert f"(profile {path}, measured" in reason
    assert (others, same) == ([], reason), "ranks decide alike, and one of them says so"


def test_tune_measures_registered_outputs_where_there_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of messages that fit: a quarter of the pool."""
    path = tmp_path / "profile.json"
    monkeypatch.setattr(tune_command, "QUICK_SECONDS", 1.0)
    monkeypatch.setenv("LLM_ALLREDUCE_REGISTERED_POOL", "64K")
    flags = ["--cpu", "--quick", "--tp", "2", "-b", "1K", "-e", "64K", "--output", str(path)]
    result = RUNNER.invoke(app, ["tune", *flags])
    assert result.exit_code == 0, result.output
    (made,) = profiles.read(path).entries
    assert made.registered is not None
    assert all(("UB" in row.eager_us) == (row.bytes <= 16 << 10) for row in made.measured)
    assert "registered outputs" in result.output


def test_tune_has_the_registered_memory_that_the_settings_ask_for() -> None:
    pool = tune_command._registered_pool
    assert pool(AllReduceConfig(), "cuda") is None
    assert pool(AllReduceConfig(registered_pool="1M"), "cuda") == 1 << 20
    assert pool(AllReduceConfig(allreduce_strategy="UB"), "cuda") == 512 << 20
    assert pool(AllReduceConfig(allreduce_strategy="ub"), "cpu") == 16 << 20
    assert pool(AllReduceConfig(allreduce_strategy="UB", registered_pool=0), "cpu") == 0


def _by_profile(context: RankContext, strategy: str, path: str) -> tuple[list[dict[str, int]], str]:
    """What calls are counted as: into fresh outputs, registered ones and others; all with the same bits."""
    counted = []
    inputs = [torch.randn(4096, generator=torch.Generator().manual_seed(rank)) for rank in range(context.world_size)]
    mine, expected = inputs[context.rank], rank_ordered_sum(inputs)
    with checks.communicator(context, strategy, tuning_profile=path, registered_pool="1M") as group:
        for out in (None, group.registered_empty((4096,), torch.float32), torch.empty(4096)):
            before = group.report()["calls"]
            assert_same_bits(group.all_reduce(mine, out), expected, strategy)
            calls = group.report()["calls"]
            counted.append({name: count - before.get(name, 0) for name, count in calls.items()})
        return counted, group.explain((4096,), torch.float32).reason


@pytest.mark.parametrize("strategy", ["AUTO", "MINLATENCY"])
def test_a_profile_places_registered_outputs_alone(cpu_pool: PoolFor, tmp_path: Path, strategy: str) -> None:
    path = tmp_path / "profile.json"
    made = cpu_entry(2, eager=((None, "ONESHOT"),), registered=registered(((8192, "TWOSHOT"), (None, "UB"))))
    profiles.store(path, NodeIdentity.of_cpu(), [made])
    answers = cpu_pool(2).run(_by_profile, strategy, str(path))
    placed, pushed = ("UB", "ONESHOT") if strategy == "AUTO" else ("MINLATENCY (place)", "MINLATENCY")
    for counted, reason in answers:
        assert counted == [{placed: 1}, {placed: 1}, {placed: 0, pushed: 1}]
        assert "16 KiB are more than 8 KiB, where results stored into registered outputs were fastest" in reason


def test_what_ends_a_run_costs_one_group_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry of a group is kept before the next one is measured."""
    path, measure_norms = tmp_path / "profile.json", FusedTuner.sweep

    def sweep(tuner: FusedTuner) -> None:
        if tuner._group.world_size > 2:
            message = "a test ends it"
            raise WrongAnswerError(message)
        measure_norms(tuner)

    monkeypatch.setattr(FusedTuner, "sweep", sweep)
    flags = ["--cpu", "--quick", "--tp", "2,3", "-b", "1K", "-e", "16K", "--output", str(path)]
    result = RUNNER.invoke(app, ["tune", *flags])
    assert result.exit_code == 1
    assert "a test ends it" in result.output
    assert [entry.world_size for entry in profiles.read(path).entries] == [2]


def test_the_cached_profile_is_used_and_a_broken_one_ignored(cpu_pool: PoolFor, tmp_path: Path) -> None:
    (lines, reason), _ = cpu_pool(2).run(_start, {})
    assert "these sizes come from the seed table for 2 ranks over the memory of CPU ranks" in " ".join(lines)
    made = cpu_entry(2, graph=CHANGING)
    path = Path(cpu_pool(2).run(_cache_path)[0])
    try:
        profiles.store(path, NodeIdentity.of_cpu(), [made])
        (lines, reason), _ = cpu_pool(2).run(_start, {})
        assert f"these sizes come from profile {path}, measured 2025-01-02 in eager calls" in lines
        assert "4 KiB are like all sizes, where two steps beat one" in reason, "CPU ranks' calls are eager ones"
        path.write_text("{}")
        (lines, reason), _ = cpu_pool(2).run(_start, {})
        assert f"tuning profile {path}: it is no tuning profile: ignored" in lines
        assert "the seed table for 2 ranks" in reason
        assert path.read_text() == "{}"
    finally:
        path.unlink()


def _cache_path(_context: RankContext) -> str:
    from llm_allreduce_plugin.profiles.search import cache_path

    return str(cache_path(NodeIdentity.of_cpu()))


def _refused(context: RankContext, path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        context.communicator("AUTO", tuning_profile=path)
    return str(caught.value)


def test_a_configured_profile_that_cannot_be_used_stops_every_rank(cpu_pool: PoolFor, tmp_path: Path) -> None:
    answers = cpu_pool(2).run(_refused, str(tmp_path / "none.json"))
    assert answers == [answers[0]] * 2
    assert "none.json: it cannot be read: No such file or directory" in answers[0]


def _compare_with_a_fault(context: RankContext) -> Comparison:
    """One element of one rank's two-shot answer off by a bit."""
    compare.form_groups(context, (context.world_size,))
    compare.open_kernels(context, context.world_size, KERNELS, OurSettings())
    candidate = worker.opened("TWOSHOT")
    bind = candidate.bind

    def bad_bind(x: torch.Tensor) -> Bound:
        call = bind(x)

        def bad_call() -> torch.Tensor:
            output = call()
            if context.rank == 1:
                output.view(-1)[17] += 1
            return output

        return bad_call

    candidate.bind = bad_bind
    try:
        return compare.compare(context, context.world_size, KERNELS, 512, "bfloat16", Effort(2, 2, 2, 1))
    finally:
        worker.close_all(context)


def test_nothing_is_timed_when_an_answer_is_wrong(cpu_pool: PoolFor) -> None:
    for found in cpu_pool(2).run(_compare_with_a_fault):
        assert found.wrong == {"ONESHOT": 0, "TWOSHOT": 1}
        assert found.eager_us == {}


def _compare_norms_with_a_fault(context: RankContext) -> tuple[Comparison | str, Comparison | str]:
    """Both ways as they are, then with one element of one rank's fused answer off by a bit."""
    compare.form_groups(context, (context.world_size,))
    compare.open_kernels(context, context.world_size, KERNELS, OurSettings())
    group, effort = compare.communicator_of(context.world_size), Effort(2, 2, 2, 1)
    given = (context, context.world_size, "TWOSHOT", 3, 512, "bfloat16", effort)
    call_of = type(group).norm_call_of

    def spoiled_call_of(strategy: str, shape: NormShape, *, fused: bool) -> NormCall:
        call = call_of(group, strategy, shape, fused=fused)

        def spoiled(*arguments: Any) -> Normed:
            normed = call(*arguments)
            if fused and context.rank == 1:
                normed.residual_out.view(-1)[17] += 1
            return normed

        return spoiled

    try:
        right = norm_compare.compare_norms(*given)
        with mock.patch.object(group, "norm_call_of", spoiled_call_of, create=True):
            return right, norm_compare.compare_norms(*given)
    finally:
        worker.close_all(context)


def test_no_norm_is_timed_when_an_answer_is_wrong(cpu_pool: PoolFor) -> None:
    for right, spoiled in cpu_pool(2).run(_compare_norms_with_a_fault):
        assert right.wrong == {"fused": 0, "then-norm": 0}
        assert right.bytes == spoiled.bytes == 3 * 512 * 2
        assert all(right.eager_us[way] > 0 for way in ("fused", "then-norm"))
        assert spoiled.wrong == {"fused": 1, "then-norm": 0}
        assert spoiled.eager_us == {}


def _compare_what_is_not_fused(context: RankContext) -> Comparison | str:
    compare.form_groups(context, (context.world_size,))
    compare.open_kernels(context, context.world_size, KERNELS, OurSettings())
    try:
        return norm_compare.compare_norms(context, context.world_size, "ONESHOT", 1, 64, "float32", Effort(2, 2, 2, 1))
    finally:
        worker.close_all(context)


def test_what_is_not_fused_is_not_compared(cpu_pool: PoolFor) -> None:
    assert cpu_pool(2).run(_compare_what_is_not_fused) == ["only 16-bit types are fused, not float32"] * 2


@pytest.mark.parametrize("world_size", (2, 3))
def test_a_normed_row_is_the_same_in_one_kernel_and_in_two(cpu_pool: PoolFor, tmp_path: Path, world_size: int) -> None:
    """A profile that says two kernels for some sizes."""
    path = tmp_path / "profile.json"
    made = cpu_entry(
        world_size,
        eager=[(None, "ONESHOT")],
        fused=fused(norm_checks.limits_of_batches(64)),
    )
    profiles.store(path, NodeIdentity.of_cpu(), [made])
    one, two = "ONESHOT (fused norm)", "ONESHOT, then norm"
    for runs in cpu_pool(world_size).run(norm_checks.runs_of_batches, 64, {"tuning_profile": str(path)}):
        assert runs == [one, one, two, two, two, one, one, two, two, two]  # by norm_checks.BATCHES


@pytest.mark.parametrize("world_size", (2, 3))
def test_a_row_is_the_same_in_every_batch(cpu_pool: PoolFor, tmp_path: Path, world_size: int) -> None:
    """Batches from 1 to 4096 rows under AUTO, with a profile that changes its mind five times on the way."""
    path = tmp_path / "profile.json"
    made = cpu_entry(
        world_size,
        graph=CHANGING,
        eager=CHANGING,
    )
    profiles.store(path, NodeIdentity.of_cpu(), [made])
    for strategies in cpu_pool(world_size).run(checks.check_batches, 24, {"tuning_profile": str(path)}):
        assert strategies == ["ONESHOT", "TWOSHOT"] * 3


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--cpu", "--tp", "2,x"], "--tp 2,x: 'x' must be 2 to 72"),
        (["--cpu", "--tp", "73"], "'73' must be 2 to 72"),
        (["--cpu", "--dtype", "int8"], "--dtype int8: 'int8' must be one of float, float32"),
        (["--cpu", "--dtype", "bf16,half"], "one entry for 16-bit elements"),
        (["--cpu", "--transport", "host"], "CPU ranks have one transport"),
        (["--cpu", "--transport", "ether"], "must be one of auto, peer, host"),
        (["--cpu", "-b", "1000"], "must be a multiple of 16"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], complaint: str, tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["tune", *flags, "--output", str(tmp_path / "x.json")], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
