"""llm-allreduce bench: flags, sizes, the table, and what counts as wrong."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_allreduce_plugin.bench import candidates, table, worker
from llm_allreduce_plugin.bench.candidates import Candidate
from llm_allreduce_plugin.bench.worker import Measurement
from llm_allreduce_plugin.cli import app, bench_subject
from llm_allreduce_plugin.cli.bench import message_sizes, parse_bytes
from llm_allreduce_plugin.measure import answers, norm_answers, products
from llm_allreduce_plugin.measure.products import MatrixProduct
from llm_allreduce_plugin.measure.timing import Timing
from llm_allreduce_plugin.norm import Normed, QuantKind

RUNNER = CliRunner()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512", 512), ("4K", 4096), ("4k", 4096), ("1M", 1 << 20), ("2GiB", 2 << 30), ("8KiB", 8192)],
)
def test_sizes_as_nccl_tests_write_them(text: str, size: int) -> None:
    assert parse_bytes("--bytes", text) == size


@pytest.mark.parametrize("text", ("", "0", "-4", "4X", "K", "1.5M", "8KB", "1025G", "9" * 5000))
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse_bytes("--maxbytes", text)
    said = str(caught.value)
    assert said.startswith("--maxbytes ")
    assert said.count("must be") == 1
    assert len(said) < 300


@pytest.mark.parametrize(
    ("command", "option"),
    [("bench", "--minbytes"), ("bench", "--maxbytes"), ("bench", "--stepbytes"), ("tune", "--minbytes"),
     ("tune", "--maxbytes"), ("breakeven", "--bytes"), ("explain", "--bytes")],
)  # fmt: skip
@pytest.mark.parametrize("text", ("0", "8KB"))
def test_an_error_of_a_size_names_its_option(command: str, option: str, text: str) -> None:
    result = CliRunner().invoke(app, [command, "--cpu", option, text], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert f"{option} '{text}': must be" in " ".join(result.output.replace("│", " ").split())


@given(st.integers(1, 1 << 20), st.integers(0, 1 << 24), st.integers(2, 8), st.none() | st.integers(1 << 16, 1 << 20))
def test_size_ranges(smallest: int, more: int, factor: int, step: int | None) -> None:
    sizes = message_sizes(smallest, smallest + more, factor, step, halves=False)
    assert sizes[0] == smallest
    assert sizes == sorted(set(sizes))
    assert sizes[-1] <= smallest + more
    following = sizes[-1] + step if step else sizes[-1] * factor
    assert following > smallest + more
    assert set(sizes) <= set(message_sizes(smallest, smallest + more, factor, step, halves=True))


def test_empty_range() -> None:
    with pytest.raises(typer.BadParameter, match="--maxbytes 10 is less than --minbytes 20"):
        message_sizes(20, 10, 2, None, halves=False)


def test_bandwidths_are_those_of_nccl_tests() -> None:
    """busbw = algbw * 2 (n-1) / n for an all-reduce."""
    algorithm, bus = table.bandwidths(1 << 30, 1000.0, 4)
    assert algorithm == pytest.approx(1073.741824)
    assert bus == pytest.approx(1073.741824 * 1.5)


def test_table() -> None:
    row = Measurement("ONESHOT", 4096, 2048, eager_us=10.0, graph_us=2.0, eager_wrong=0, graph_wrong=3)
    line = table.line(row, "bfloat16", 2)
    assert line.split() == [
        "4096",
        "2048",
        "bfloat16",
        "sum",
        "10.00",
        "0.41",
        "0.41",
        "0",
        "2.00",
        "2.05",
        "2.05",
        "3",
    ]
    left_out = table.line(Measurement("x", 4096, 2048, left_out="too large"), "bfloat16", 2)
    assert left_out.endswith("left out: too large")
    unchecked = table.line(Measurement("x", 4096, 2048, eager_us=1.0), "bfloat16", 2)
    assert unchecked.split()[7:] == ["N/A", "-", "-", "-", "-"]
    other = Measurement("NCCL", 4096, 2048, eager_us=12.0, graph_us=9.0)
    header, cells = table.side_by_side([row, other], ["ONESHOT", "NCCL"]).splitlines()
    assert header.split()[-2:] == ["ONESHOT", "NCCL"]
    assert cells.split() == ["4096", "2.00*", "9.00"]


def test_rows_in_the_table() -> None:
    row = Measurement("fused", 2 * 3 * 8192, 3 * 8192, eager_us=10.0, eager_wrong=0)
    assert table.line(row, "bfloat16", 2, 8192).split()[:4] == ["49152", "3x8192", "bfloat16", "norm"]


def test_sizes_are_rounded_down_to_whole_rows() -> None:
    norm = bench_subject.norm_of(fused=True, hidden=2880, quant=None)
    assert norm is not None
    assert norm.counts([1024, 6000, 8192, 1 << 20], "bfloat16") == [2880, 182 * 2880]
    with pytest.raises(typer.BadParameter, match="--maxbytes 1024: less than a row of 2880 bfloat16, 5760 bytes"):
        norm.counts([1024], "bfloat16")
    assert bench_subject.norm_of(fused=False, hidden=None, quant=None) is None
    default = bench_subject.norm_of(fused=True, hidden=None, quant=QuantKind.NVFP4)
    assert default == bench_subject.Norm(8192, QuantKind.NVFP4)


def _norm_case(kind: QuantKind | None) -> tuple[Normed, Normed]:
    """The same answer twice."""
    cpu = torch.device("cpu")
    total = answers.rank_ordered_sum(3, 2, 16 * 256, torch.bfloat16, cpu).view(16, 256)
    residual, weight = norm_answers.make_beside(3, 16, 256, torch.bfloat16, cpu)
    quant = norm_answers.make_quant(kind, cpu)
    found = [norm_answers.expected(total, residual, weight, 1e-5, quant) for _ in range(2)]
    return found[0], found[1]


@pytest.mark.parametrize("kind", (None, *QuantKind))
def test_a_norm_is_right_to_the_bit_or_within_what_rounding_costs(kind: QuantKind | None) -> None:
    answer, expected = _norm_case(kind)
    for exact in (True, False):
        assert norm_answers.wrong_elements(answer, expected, exact=exact, world_size=2) == 0
    for number, tensor in enumerate(answer):
        if tensor is None:
            continue
        other, _ = _norm_case(kind)
        part = other[number]
        assert part is not None
        part.view(torch.uint8).view(-1)[17] ^= 1
        assert norm_answers.wrong_elements(other, expected, exact=True, world_size=2) == 1, Normed._fields[number]
    assert norm_answers.wrong_elements(
        answer._replace(norm_out=answer.residual_out), expected, exact=False, world_size=2
    )
    if kind is QuantKind.FP8:
        assert answer.quant_out is not None
        off = answer._replace(quant_out=(answer.quant_out.float() * 1.6).to(torch.float8_e4m3fn))
        assert norm_answers.wrong_elements(off, expected, exact=False, world_size=2) > 1000


def test_exact_means_every_bit() -> None:
    expected = answers.rank_ordered_sum(7, 3, 1000, torch.bfloat16, torch.device("cpu"))
    output = expected.clone()
    assert answers.wrong_elements(output, expected, exact=True, world_size=3) == 0
    output.view(torch.int16)[5] ^= 1
    assert answers.wrong_elements(output, expected, exact=True, world_size=3) == 1
    assert answers.wrong_elements(output, expected, exact=False, world_size=3) == 0, "one unit in the last place"
    output[7] += 1
    output[8] = float("nan")
    assert answers.wrong_elements(output, expected, exact=False, world_size=3) == 2


def test_reference_is_the_sum_of_the_inputs() -> None:
    cpu = torch.device("cpu")
    inputs = [answers.make_input(11, rank, 500, torch.float16, cpu) for rank in range(4)]
    assert len({tensor.sum().item() for tensor in inputs}) == 4, "ranks have inputs of their own"
    total = torch.zeros(500)
    for tensor in inputs:
        total += tensor.float()
    assert torch.equal(answers.rank_ordered_sum(11, 4, 500, torch.float16, cpu), total.half())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--op", "max"], "--op max: must be sum"),
        (["-d", "int8"], "--dtype int8: must be one of"),
        (
            ["--cpu", "--with", "ONESHOT,magic"],
            "--with magic: must be one of ONESHOT, TWOSHOT, MINLATENCY",
        ),
        (["-b", "1M", "-e", "1K"], "is less than"),
        (["--cpu", "--fused", "--with", "ONESHOT"], "--with ONESHOT: must be one of fused, then-norm"),
        (["--cpu", "--with", ","], "--with ,: names nothing: must be one of ONESHOT, TWOSHOT"),
        (["--cpu", "-b", "1", "-e", "1"], "--minbytes 1: less than an element of bfloat16, 2 bytes"),
        (["--cpu", "-b", "2", "-d", "float"], "--minbytes 2: less than an element of float32, 4 bytes"),
        (
            ["--cpu", "-b", "4", "-e", "1T", "-i", "1"],
            "--stepbytes 1: from 4 to 1099511627776 bytes there are more than 10000 sizes: give a larger step",
        ),
        (["--hidden", "64"], "--hidden 64: give --fused, too: only then messages have rows"),
        (["--fused", "--hidden", "100"], "--hidden 100: input: rows of 100 elements; RMSNorm needs a multiple of 8"),
        (["--quant", "nvfp4"], "--quant nvfp4: only norms are quantized"),
    ],
)
def test_wrong_flags_are_named(arguments: list[str], complaint: str) -> None:
    result = RUNNER.invoke(app, ["bench", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.replace("│", " ").split())


PRODUCT_US, CALL_US, EAGER_US = 30.0, 5.0, 11.0


class Gpu:
    """A rank whose clock advances by made-up times, and what it has run."""

    def __init__(self, call_us: float) -> None:
        self.call_us = call_us
        self.device, self.control_group = SimpleNamespace(type="cuda"), None
        self.now_us = 0.0
        self.ran: list[str] = []
        self.products: list[tuple[Any, ...]] = []
        self.answer = "answer"  # of calls in graphs

    def run(self, what: str, time_us: float) -> None:
        self.ran.append(what)
        self.now_us += time_us

    def time_graph(self, _context: object, call: Callable[[], Any], *_effort: object) -> Timing[Any]:
        started = self.now_us
        output = call()
        return Timing(self.now_us - started, self.now_us - started, output)

    def measured(self, monkeypatch: pytest.MonkeyPatch, candidate: Any = None, **options: Any) -> Measurement:
        gpu = self

        class Product(MatrixProduct):
            def __init__(self, context: Any, *shape: Any) -> None:
                self._context = context
                gpu.products.append(shape)

            def run(self) -> None:
                gpu.run("product", PRODUCT_US)

        def call() -> str:
            gpu.run("call", gpu.call_us)
            return gpu.answer

        message = SimpleNamespace(
            refusal=lambda _candidate: None,
            first_call=lambda _candidate: (call, "answer"),
            expected=lambda: "answer",
            wrong=lambda _candidate, found, expected: int(found != expected),
        )
        monkeypatch.setitem(worker._open, "ONESHOT", candidate or Candidate(lambda _: call))
        monkeypatch.setattr(worker, "_message", lambda *_arguments: message)
        monkeypatch.setattr(worker, "on_every_rank", lambda function, *_arguments: function())
        monkeypatch.setattr(worker, "MatrixProduct", Product)
        monkeypatch.setattr(worker.timing, "time_eager", lambda *_arguments: Timing(EAGER_US, EAGER_US, "answer"))
        monkeypatch.setattr(worker.timing, "time_graph", gpu.time_graph)
        monkeypatch.setattr(products, "time_graph", gpu.time_graph)
        return worker.measure(cast("Any", gpu), "ONESHOT", 24_576, worker.Options("bfloat16", **options))


def test_calls_between_products_take_what_they_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product stands before each call; products alone are timed first, and taken off. Calls in a row have none."""
    gpu = Gpu(CALL_US)
    row = gpu.measured(monkeypatch, between=4096)
    assert (row.graph_us, row.product_us, row.eager_us) == (CALL_US, PRODUCT_US, EAGER_US)
    assert (row.eager_wrong, row.graph_wrong, row.time_us) == (0, 0, CALL_US)
    assert gpu.ran == ["product", "product", "call"]
    assert gpu.products == [(3, 4096, 8192, torch.bfloat16)], "as many rows as the message has"


def test_calls_without_products_take_all_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(CALL_US)
    row = gpu.measured(monkeypatch)
    assert (row.graph_us, row.product_us) == (CALL_US, None)
    assert gpu.ran == ["call"]
    assert gpu.products == []


@pytest.mark.parametrize(("overwrites", "wrong"), [(False, 1), (True, 0)])
def test_answers_of_graphs_whose_calls_overwrite_their_input_are_not_judged(
    monkeypatch: pytest.MonkeyPatch, overwrites: bool, wrong: int
) -> None:
    """They are sums of sums. Those of other graphs, and of calls from the host, are judged."""
    gpu = Gpu(CALL_US)
    gpu.answer = "sum of sums"
    row = gpu.measured(monkeypatch, Candidate(lambda _: lambda: torch.empty(0), graphs_overwrite=overwrites))
    assert (row.eager_wrong, row.graph_wrong) == (0, wrong)


def test_a_call_that_is_hidden_wholly_takes_no_negative_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it the graph was faster than products alone, as clocks go."""
    row = Gpu(-2.0).measured(monkeypatch, between=4096)
    assert (row.graph_us, row.product_us) == (worker.LEAST_US, PRODUCT_US)


def test_rows_of_products_are_those_of_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden, rows in ((4096, 6), (32_768, 1)):
        gpu = Gpu(CALL_US)
        gpu.measured(monkeypatch, between=512, hidden=hidden)
        assert gpu.products == [(rows, 512, hidden, torch.bfloat16)]


def test_products_between_calls_are_for_graphs() -> None:
    result = RUNNER.invoke(app, ["bench", "--cpu", "--between", "4096"])
    assert result.exit_code == 2
    assert "products stand in CUDA graphs" in result.output


def test_sglang_finds_the_group_of_all_ranks_while_its_kernels_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.5.23 asks it which ranks see each other's GPUs; releases before ask nobody."""
    held: list[Any] = []

    @contextlib.contextmanager
    def override(*, world_group: Any) -> Iterator[None]:
        held.append(world_group)
        yield
        held.clear()

    barriers: list[object] = []

    def barrier(group: object) -> None:
        barriers.append(group)

    monkeypatch.setattr(candidates.dist, "barrier", barrier)
    context = cast("Any", SimpleNamespace(rank=1, control_group="gloo's"))
    monkeypatch.setitem(sys.modules, "sglang", ModuleType("sglang"))
    monkeypatch.setitem(sys.modules, "sglang.srt", ModuleType("sglang.srt"))
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", None)  # as in older ones
    with candidates.sglang_world(context):
        assert held == []
    runtime = ModuleType("sglang.srt.runtime_context")
    runtime.get_parallel = lambda: SimpleNamespace(override=override)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", runtime)
    with candidates.sglang_world(context):
        (world,) = held
        assert world.local_rank == 1
        world.barrier()
    assert barriers == ["gloo's"]
    assert held == []
