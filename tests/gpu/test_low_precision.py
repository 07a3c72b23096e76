"""The wire formats' kernels and the compressed all-reduce on GPUs, against the torch oracle."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from tests.support.local_group import LocalGroup, message_of
from tests.support.low_precision import ANY_OWNER, DOMAINS, assert_same_numbers, expected_sum
from tests.support.reference import DTYPES, assert_same_bits, fresh_seed, rank_input, rank_ordered_sum, special_inputs
from tests.support.rows import HIDDEN, check_rows, rows_of

pytestmark = pytest.mark.gpu(1)

WORLD_SIZES = (2, 3, 4, 5, 6, 7, 8)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
SIZES = (1, 31, 495, 497, 15_000, 40_000, 300_001)
KINDS = pytest.mark.parametrize(
    "kind",
    [
        {"split": (2, 1)},
        {"split": (2, 0)},
        {"unsplit": Algorithm.TWO_SHOT},
        {"unsplit": Algorithm.ONE_SHOT},
        {"split": (2, 1), "wire_format": WireFormat.FP8_GROUP},
        {"unsplit": Algorithm.TWO_SHOT, "wire_format": WireFormat.FP8_GROUP},
        {"unsplit": Algorithm.ONE_SHOT, "wire_format": WireFormat.FP8_GROUP},
        *({"in_band": False, "wire_format": wire} for wire in WireFormat),
        *({"host": True, "wire_format": wire} for wire in WireFormat),
    ],
    ids=("in band, three tasks", "in band, reducers drain", "in band, no split", "in band, one step")
    + ("in band, fp8_group", "in band, fp8_group, no split", "in band, fp8_group, one step")
    + tuple(f"{where}, {wire}" for where in ("flagged", "host") for wire in WireFormat),
)


@pytest.mark.parametrize("wire", list(WireFormat), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codec_kernels_are_the_oracle(dtype: torch.dtype, wire: WireFormat) -> None:
    """Every 16-bit pattern, in order and shuffled, and values of all magnitudes; odd counts."""
    codec = CODECS[wire]
    word = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(dtype)
    stream = torch.cuda.current_stream().cuda_stream
    for values in (everything, everything[torch.randperm(1 << 16)], rank_input(fresh_seed(), 0, 12_345, dtype)):
        mine = values.cuda()
        packets = torch.full((codec.bytes_of(len(values)),), 0xA5, dtype=torch.uint8, device="cuda")
        _C.encode(codec.code, DTYPE_CODES[dtype], mine.data_ptr(), len(values), packets.data_ptr(), stream)
        expected = codec.encode(values)
        assert torch.equal(packets.cpu(), expected)
        back = torch.full((len(values) + 8,), 7.0, dtype=dtype, device="cuda")
        _C.decode(codec.code, DTYPE_CODES[dtype], packets.data_ptr(), len(values), back.data_ptr(), stream)
        torch.cuda.synchronize()
        decoded = codec.decode(expected, len(values)).to(dtype)
        seen = back.cpu()
        assert (seen[len(values) :] == 7).all(), "wrote behind the end"
        seen = seen[: len(values)]
        assert torch.equal(seen.isnan(), decoded.isnan())
        numbers = ~decoded.isnan()
        assert torch.equal(seen[numbers].view(word), decoded[numbers].view(word))


def expected(group: LocalGroup, inputs: list[torch.Tensor]) -> torch.Tensor:
    return expected_sum(group.launch_of("LOWPRECISION", message_of(inputs[0])), inputs)


def compare(group: LocalGroup, inputs: list[torch.Tensor], what: str) -> None:
    outputs = [output.cpu() for output in group.all_reduce("LOWPRECISION", inputs)]
    for output in outputs:
        assert torch.equal(output.view(torch.int16), outputs[0].view(torch.int16)), f"{what}: ranks differ"
    assert_same_numbers(outputs[0], expected(group, inputs), what)


@KINDS
@pytest.mark.parametrize("workspace_mib", (64, 2), ids=("one round", "rounds"))
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sizes(world_size: int, dtype: torch.dtype, workspace_mib: int, kind: dict[str, Any]) -> None:
    group = LocalGroup(world_size, lanes=5, workspace_mib=workspace_mib, **kind)
    for size in SIZES:
        seed = fresh_seed()
        inputs = [rank_input(seed, rank, size, dtype) for rank in range(world_size)]
        compare(group, inputs, f"{dtype} x {size}, {world_size} ranks, seed {seed}")


@KINDS
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_special_values(dtype: torch.dtype, kind: dict[str, Any]) -> None:
    group = LocalGroup(5, **kind)
    compare(group, special_inputs(5, dtype), f"{dtype}")


@KINDS
def test_between_exact_calls(kind: dict[str, Any]) -> None:
    """They share slots and counts with TWOSHOT."""
    group = LocalGroup(4, lanes=5, workspace_mib=2, **kind)
    for turn in range(40):
        seed, size = fresh_seed(), (512, 5000, 40_000, 123_456)[turn % 4]
        inputs = [rank_input(seed, rank, size, torch.bfloat16) for rank in range(4)]
        if turn % 3 == 0:
            for output in group.all_reduce("TWOSHOT", inputs):
                assert_same_bits(output, rank_ordered_sum(inputs), f"turn {turn}, seed {seed}")
        else:
            compare(group, inputs, f"turn {turn}, seed {seed}")


@KINDS
def test_graph_replays(kind: dict[str, Any]) -> None:
    _replay(LocalGroup(4, **kind))


def _replay(group: LocalGroup, between: Callable[[int], None] = lambda turn: None) -> None:
    """Captures a call on every rank and replays the graphs with fresh input, with something in between."""
    size, ranks = 20_000, range(group.world_size)
    inputs = [torch.zeros(size, dtype=torch.bfloat16, device=group.device) for _ in ranks]
    outputs = [torch.empty_like(part) for part in inputs]
    graphs = []
    torch.cuda.synchronize()
    settings = group.low_precision
    for rank in ranks:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=group.streams[rank]):
            group.start(rank, "LOWPRECISION", inputs[rank], outputs[rank])
        graphs.append(graph)
    for turn in range(20):
        fresh = [rank_input(turn, rank, size, torch.bfloat16) for rank in ranks]
        for part, values, output in zip(inputs, fresh, outputs, strict=True):
            part.copy_(values)
            output.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, group.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        group.low_precision = settings
        for output in outputs:
            assert_same_bits(output.cpu(), expected(group, fresh), f"turn {turn}")
        between(turn)


ROW_KINDS: dict[str, dict[str, Any]] = {
    "in band, three tasks": {"split": (2, 1)},
    "in band, no split": {"unsplit": Algorithm.TWO_SHOT},
    "in band, one step": {"unsplit": Algorithm.ONE_SHOT},
    "flagged": {"in_band": False},
    "host": {"host": True},
    "staged": {"in_band": False, "staged": True, "lanes": 2},
}


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("kind", ROW_KINDS.values(), ids=ROW_KINDS)
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_a_row_s_answer_does_not_depend_on_its_batch(world_size: int, kind: dict[str, Any], hidden: int) -> None:
    if "staged" in kind and world_size == 2:
        pytest.skip("nothing is staged")
    seed = fresh_seed()
    group = LocalGroup(world_size, **({"lanes": 5, "workspace_mib": 8} | kind), wire_format=WireFormat.FP8_GROUP)
    parts = [rows_of(seed, rank, hidden).to(group.device) for rank in range(world_size)]

    def all_reduce(index: torch.Tensor) -> torch.Tensor:
        inputs = [part[index.to(part.device)].flatten() for part in parts]
        outputs = group.all_reduce("LOWPRECISION", inputs)
        assert all(torch.equal(output.view(torch.int16), outputs[0].view(torch.int16)) for output in outputs)
        return outputs[0].view(len(index), hidden)

    check_rows(all_reduce, (1, 2, 3, 7, 33, 257, 1031), seed, f"{world_size} ranks, {hidden} wide")


# -- as a ring and over domains: with flags, whatever the format -------------------------------------------------------

FORMS = pytest.mark.parametrize(
    ("world_size", "form"),
    [(size, ("ring", None)) for size in (2, 3, 4, 8)]
    + [(len(domains), ("hierarchical", domains)) for domains in DOMAINS.values()],
    ids=[f"ring of {size}" for size in (2, 3, 4, 8)] + [f"hierarchical {name}" for name in DOMAINS],
)
FLAGGED = pytest.mark.parametrize("kind", [{"in_band": False}, {"host": True}], ids=("peer", "host"))
Form = tuple[str, tuple[int, ...] | None]


@FORMS
@FLAGGED
@pytest.mark.parametrize("wire", ANY_OWNER, ids=str)
def test_forms(world_size: int, form: Form, wire: WireFormat, kind: dict[str, Any]) -> None:
    for workspace_mib in (64, 2):  # one round, and rounds
        group = LocalGroup(world_size, lanes=5, workspace_mib=workspace_mib, wire_format=wire, **kind)
        group.use(*form)
        for dtype in SIXTEEN_BITS:
            for size in SIZES:
                seed = fresh_seed()
                inputs = [rank_input(seed, rank, size, dtype) for rank in range(world_size)]
                compare(group, inputs, f"{dtype} x {size}, {workspace_mib} MiB, seed {seed}")
            compare(group, special_inputs(world_size, dtype), f"{dtype}, special values")


@FLAGGED
@pytest.mark.parametrize("domains", list(DOMAINS.values()), ids=list(DOMAINS))
def test_forms_share_slots_flags_and_counts(domains: tuple[int, ...], kind: dict[str, Any]) -> None:
    """With each other, with the compressed two-shot and, through its flagged slots, with TWOSHOT."""
    world_size = len(domains)
    group = LocalGroup(world_size, lanes=5, workspace_mib=2, wire_format=WireFormat.TQ3, **kind)
    generator = random.Random(fresh_seed())
    for turn in range(40):
        seed, dtype = fresh_seed(), generator.choice(SIXTEEN_BITS)
        size = generator.choice((512, 5000, 40_000, 1_000_001))
        inputs = [rank_input(seed, rank, size, dtype) for rank in range(world_size)]
        name = generator.choice(("TWOSHOT", "two_shot", "ring", "hierarchical"))
        what = f"turn {turn}, {name} of {size}, seed {seed}"
        if name == "TWOSHOT":
            for output in group.all_reduce("TWOSHOT", inputs):
                assert_same_bits(output, rank_ordered_sum(inputs), what)
            continue
        group.use(name, domains if name == "hierarchical" else None)
        compare(group, inputs, what)


@FORMS
@FLAGGED
def test_graph_replays_of_forms(world_size: int, form: Form, kind: dict[str, Any]) -> None:
    group = LocalGroup(world_size, wire_format=WireFormat.TQ3, **kind)
    group.use(*form)

    def other_call(turn: int) -> None:
        group.use("ring" if turn % 2 else "two_shot")
        inputs = [rank_input(turn, rank, 3000 * (turn % 3 + 1), torch.float16) for rank in range(world_size)]
        compare(group, inputs, f"between, turn {turn}")

    _replay(group, other_call)


@pytest.mark.parametrize("form", ("ring", "hierarchical"))
@pytest.mark.parametrize("memory", ("peer", "host"))
def test_a_missing_rank_stops_forms_with_a_named_error(form: str, memory: str) -> None:
    """The trap ends the CUDA context, so this needs a process of its own."""
    script = """
import sys, torch
from llm_allreduce_plugin.runtime.failures import failure_of
from tests.support.local_group import LocalGroup
domains = (0, 0, 1, 1) if sys.argv[1] == "hierarchical" else None
group = LocalGroup(
    4, in_band=False, host=sys.argv[2] == "host", timeout_s=2.0, algorithm=sys.argv[1], domains=domains
)
inputs = [torch.ones(5000, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
outputs = [torch.empty_like(part) for part in inputs]
torch.cuda.synchronize()
for rank in (0, 1, 3):
    group.start(rank, "LOWPRECISION", inputs[rank], outputs[rank])
try:
    torch.cuda.synchronize()
except Exception as error:
    print("cuda:", type(error).__name__)
for rank in (0, 1, 3):
    failure = failure_of(group.workspaces[rank])
    if failure is not None:
        print("named:", failure)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, form, memory], capture_output=True, text=True, timeout=120, check=False
    )
    assert "cuda: " in result.stdout, (result.stdout, result.stderr[-2000:])
    # Who waits for the missing rank, or for one that does, and is the first to give up, is a matter of microseconds.
    named = r"named: rank \d waited 2 s for rank [0-3] in LOWPRECISION/(scatter|exchange|gather)"
    assert re.search(named, result.stdout), result.stdout
