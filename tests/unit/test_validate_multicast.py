"""benchmarks/multicast.py, which only the owner of a node with NVSwitch runs: on ranks that are threads, whose group is
made up. Decisions and the judgement of answers are the real ones; nothing is asked of a driver."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

import pytest
import torch

from benchmarks import multicast as script
from llm_allreduce_plugin import AllReduceConfig
from llm_allreduce_plugin.algorithms.decision import Decision
from llm_allreduce_plugin.algorithms.facts import GroupFacts, MulticastBytes
from llm_allreduce_plugin.group.capabilities import group_facts
from llm_allreduce_plugin.measure.answers import rank_ordered_sum
from llm_allreduce_plugin.measure.ranks import RankFailedError
from llm_allreduce_plugin.measure.timing import Timing
from llm_allreduce_plugin.selection.policy import decide
from llm_allreduce_plugin.topology.model import NodeTopology
from tests.conftest import MULTICAST_SWITCHES

NODE = NodeTopology.from_json(Path(__file__).parents[2] / "configs" / "topologies" / "h100_x8_nvswitch.json")
RANKS = 2
COUNTS = (1, 7, 1023)
SIZES = [4096, 2 * script.ONE_SHOT_MOST]
CPU = torch.device("cpu")
# What an all-reduce of this rank, subject and number of elements gives instead of the sum.
Spoil = Callable[[int, str, torch.Tensor], torch.Tensor]


def as_it_is(_rank: int, _subject: str, output: torch.Tensor) -> torch.Tensor:
    return output


class Exchange:
    """Where threads that are ranks meet."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(RANKS, timeout=20.0)
        self._values: list[Any] = [None] * RANKS

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


class Group:
    """What :func:`script.validate` asks of a communicator."""

    def __init__(self, context: Context, config: AllReduceConfig, facts: GroupFacts) -> None:
        self._context, self._config, self.facts = context, config, facts
        self.closed = False

    def explain(self, shape: tuple[int, ...], dtype: torch.dtype) -> Decision:
        return decide(self._config, self.facts, shape[0], str(dtype).removeprefix("torch."))

    def all_reduce(self, mine: torch.Tensor) -> torch.Tensor:
        total = rank_ordered_sum(self._context.seed, RANKS, mine.numel(), mine.dtype, CPU)
        subject = self.explain((mine.numel(),), mine.dtype).counted_as
        return self._context.spoil(self._context.rank, subject, total)

    def close(self) -> None:
        self.closed = True


class Context:
    """A rank. ``refused``: why its group has no multicast."""

    def __init__(self, exchange: Exchange, rank: int, spoil: Spoil, refused: str) -> None:
        self._exchange, self.rank, self.spoil, self._refused = exchange, rank, spoil, refused
        self.world_size, self.device, self.group, self.seed = RANKS, CPU, None, 0
        self.made: list[Group] = []

    def shared_seed(self) -> int:
        self.seed += 1
        return self.seed

    def gather(self, value: Any) -> list[Any]:
        return self._exchange.gather(self.rank, value)

    def communicator(self, strategy: str, **settings: Any) -> Group:
        config = AllReduceConfig(allreduce_strategy=strategy, **settings)
        facts = group_facts(NODE, RANKS, AllReduceConfig(allreduce_strategy=strategy))
        if self._refused:
            facts = facts.without_multicast(self._refused)
        elif settings:
            inputs = (1 << 24) if config.in_switch_sum else 0
            facts = dataclasses.replace(
                facts, multicast=MulticastBytes(1 << 22, 1 << 24, inputs), no_multicast_reason=""
            )
        self.made.append(Group(self, config, facts))
        return self.made[-1]


class Pool:
    """A pool whose ranks are threads."""

    def __init__(self, spoil: Spoil = as_it_is, refused: str = "") -> None:
        exchange = Exchange()
        self.contexts = [Context(exchange, rank, spoil, refused) for rank in range(RANKS)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        assert all(group.closed for context in self.contexts for group in context.made)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 0.0) -> list[Any]:
        results: list[Any] = [None] * RANKS

        def one(context: Context) -> None:
            try:
                results[context.rank] = function(context, *arguments)
            except BaseException as error:  # looked at below
                results[context.rank] = error

        threads = [threading.Thread(target=one, args=(context,), daemon=True) for context in self.contexts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed := {rank: repr(error) for rank, error in enumerate(results) if isinstance(error, BaseException)}:
            raise RankFailedError(failed)
        return results


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and smaller messages; a graph is a call, and its time made up."""
    monkeypatch.setattr(script, "COUNTS", COUNTS)
    monkeypatch.setattr(script, "time_graph", lambda _context, call: Timing(1.239, 1.0, call()))
    monkeypatch.setattr(script.dist, "all_reduce", lambda _buffer, group: None)


@pytest.mark.parametrize("name", script.SUBJECTS)
def test_what_is_right_passes(name: str) -> None:
    """Each subject is what the policy calls it. One-shot is not timed where nobody would use it."""
    with Pool() as pool:
        found = pool.run(script.validate, name, SIZES)
    timed = SIZES[:1] if name.startswith("ONESHOT") else SIZES
    assert found == [{"wrong": 0, "us": dict.fromkeys(timed, 1.24)}] * RANKS


@pytest.mark.parametrize("name", [name for name in script.SUBJECTS if "(" in name])
def test_a_proof_that_failed_is_told(name: str) -> None:
    why = "rank 1 cannot use multicast: cuMulticastBindMem: CUDA_ERROR_OUT_OF_MEMORY (2)"
    with Pool(refused=why) as pool:
        assert pool.run(script.validate, name, SIZES) == [{"refused": why}] * RANKS


def test_what_runs_otherwise_than_asked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the switch's sums were asked for, and there were no memory for their inputs."""
    monkeypatch.setitem(script.SUBJECTS, "TWOSHOT (in switch)", ("TWOSHOT", {"multicast": "on"}))
    with Pool() as pool:
        found = pool.run(script.validate, "TWOSHOT (in switch)", SIZES)
    assert found == [{"refused": "runs as TWOSHOT (multicast)"}] * RANKS


def other_bit(rank: int, subject: str, output: torch.Tensor) -> torch.Tensor:
    """The lowest bit of one element on one rank, which no tolerance would see."""
    if rank == 1 and "(" in subject and output.numel() == 1023:
        output.view(torch.int16)[511] ^= 1
    return output


@pytest.mark.parametrize("name", [name for name in script.SUBJECTS if "(" in name])
def test_one_wrong_bit_on_one_rank_is_counted(name: str) -> None:
    """In the four calls of one size. Sums in the switch may be off by it, but not on one rank alone: both see that."""
    with Pool(other_bit) as pool:
        (first, second) = pool.run(script.validate, name, SIZES[:1])
    assert first == second
    assert first["wrong"] == (8 if "in switch" in name else 4)


@pytest.mark.parametrize(("off", "wrong"), ((5, 0), (20, RANKS)))
def test_the_switch_may_round_once_more(off: int, wrong: int) -> None:
    """How it rounds differs per generation, and is not documented. At 1, so many units in the last place."""
    expected = torch.ones(1, dtype=torch.bfloat16)
    output = expected * (1 + off * torch.finfo(torch.bfloat16).eps)
    with Pool() as pool:
        found = pool.run(lambda context: script._wrong(context, output, expected, in_switch=True))
    assert sum(found) == wrong


def test_what_a_graph_computes_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(_context: Any, call: Callable[[], torch.Tensor]) -> Timing[torch.Tensor]:
        return Timing(1.0, 1.0, torch.full_like(call(), float("nan")))

    monkeypatch.setattr(script, "time_graph", spoiled)
    for name in ("TWOSHOT (multicast)", "TWOSHOT (in switch)"):
        with Pool() as pool:
            assert pool.run(script.validate, name, SIZES[:1])[0]["wrong"] >= RANKS * SIZES[0] // 2


def test_the_table_has_a_cell_for_each_size_and_subject() -> None:
    found = {
        "ONESHOT": {"wrong": 0, "us": {4096: 1.5}},
        "TWOSHOT (in switch)": {"refused": "no"},
        "NCCL": {"us": {8192: 9}},
    }
    assert script.table(cast("Any", found), [4096, 8192]).splitlines() == [
        "| bytes | ONESHOT | TWOSHOT (in switch) | NCCL |",
        "|---|---|---|---|",
        "| 4096 | 1.5 |  |  |",
        "| 8192 |  |  | 9 |",
    ]


# -- the whole of it ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the script on a pool: how it ended, what it printed, and its record."""
    record = tmp_path / "made" / "multicast.json"
    arguments = ["multicast.py", "--gpus", str(RANKS), "--min", "12", "--max", "14", "--out", str(record)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(script, "switched_off_by", lambda: None)  # the switches stay set, for whatever it starts

    def run(pool: Pool) -> tuple[str, str, str, list[dict[str, Any]]]:
        monkeypatch.setattr(script, "RankPool", lambda _ranks, _device: pool)
        ended = ""
        try:
            script.main()
        except SystemExit as error:
            ended = str(error)
        printed = capsys.readouterr()
        document = json.loads(record.read_text())
        assert document["environment"]["switches"] == MULTICAST_SWITCHES
        return ended, printed.out, printed.err, document["rows"]

    return run


def test_a_node_that_passes(run_all: Any) -> None:
    ended, printed, _, rows = run_all(Pool())
    assert ended == ""
    assert [row["subject"] for row in rows] == [*script.SUBJECTS, "NCCL"]
    assert all(row["us"] == {"4096": 1.24, "16384": 1.24} and row["wrong"] == 0 for row in rows)
    assert "TWOSHOT (in switch): 0 wrong\n" in printed
    assert printed.endswith("| 4096 | 1.24 | 1.24 | 1.24 | 1.24 | 1.24 | 1.24 |\n| 16384" + " | 1.24" * 6 + " |\n")


def test_a_node_whose_proof_fails(run_all: Any) -> None:
    ended, printed, _, rows = run_all(Pool(refused="the GPU of rank 1 has no multicast"))
    assert ended == "FAILED: ONESHOT (multicast), TWOSHOT (multicast), TWOSHOT (in switch)"
    assert "TWOSHOT (multicast): the GPU of rank 1 has no multicast\n" in printed
    assert [row["subject"] for row in rows if "refused" in row] == [name for name in script.SUBJECTS if "(" in name]


def test_a_node_whose_bits_are_wrong(run_all: Any) -> None:
    ended, printed, _, _ = run_all(Pool(other_bit))
    assert ended == "FAILED: ONESHOT (multicast), TWOSHOT (multicast), TWOSHOT (in switch)"
    assert "TWOSHOT (multicast): 4 wrong\n" in printed


def test_a_rank_that_fails_costs_no_result(run_all: Any) -> None:
    """What was found before is printed and kept."""

    def fail(_rank: int, subject: str, output: torch.Tensor) -> torch.Tensor:
        if subject == "TWOSHOT":
            message = "rank 0 waited 60 s for rank 1"
            raise RuntimeError(message)
        return output

    ended, printed, said, rows = run_all(Pool(fail))
    assert ended == "FAILED: TWOSHOT, NCCL"
    assert "error: rank 0: RuntimeError('rank 0 waited 60 s for rank 1')" in said
    assert "ONESHOT (multicast): 0 wrong" in printed
    assert "| bytes | ONESHOT | ONESHOT (multicast) | TWOSHOT | NCCL |" in printed
    assert rows[2:] == [
        {"subject": "TWOSHOT", "refused": "did not come to an end"},
        {"subject": "NCCL", "refused": "not measured"},
    ]
