"""The wire formats' kernels and the compressed all-reduce on GPUs, against the torch oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.codecs import CODECS
from llm_allreduce_plugin.codecs.two_shot import compressed_sum
from llm_allreduce_plugin.communicator import DTYPE_CODES
from llm_allreduce_plugin.config import WireFormat
from tests.support.local_group import LocalGroup, message_of
from tests.support.reference import DTYPES, assert_same_bits, fresh_seed, rank_input, rank_ordered_sum, special_inputs

pytestmark = pytest.mark.gpu(1)

WORLD_SIZES = (2, 3, 4, 5, 6, 7, 8)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
SIZES = (1, 31, 495, 497, 15_000, 40_000, 300_001)
KINDS = pytest.mark.parametrize(
    "kind",
    [
        {"split": (2, 1)},
        {"split": (2, 0)},
        *({"in_band": False, "wire_format": wire} for wire in WireFormat),
        *({"host": True, "wire_format": wire} for wire in WireFormat),
    ],
    ids=("in band, three tasks", "in band, reducers drain")
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


def expected_sum(group: LocalGroup, inputs: list[torch.Tensor]) -> torch.Tensor:
    wire = group.low_precision.wire_format
    launch = group.launch_of("LOWPRECISION", message_of(inputs[0]))
    return compressed_sum(inputs, wire, launch.owned_vectors * 16 // CODECS[wire].packet_bytes)


def compare(group: LocalGroup, inputs: list[torch.Tensor], what: str) -> None:
    expected = expected_sum(group, inputs)
    outputs = [output.cpu() for output in group.all_reduce("LOWPRECISION", inputs)]
    for output in outputs:
        assert torch.equal(output.view(torch.int16), outputs[0].view(torch.int16)), f"{what}: ranks differ"
    assert torch.equal(outputs[0].isnan(), expected.isnan()), what
    numbers = ~expected.isnan()
    assert_same_bits(outputs[0][numbers], expected[numbers], what)


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
    group = LocalGroup(4, **kind)
    size = 20_000
    inputs = [torch.zeros(size, dtype=torch.bfloat16, device=group.device) for _ in range(4)]
    outputs = [torch.empty_like(part) for part in inputs]
    graphs = []
    torch.cuda.synchronize()
    for rank in range(4):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=group.streams[rank]):
            group.start(rank, "LOWPRECISION", inputs[rank], outputs[rank])
        graphs.append(graph)
    for turn in range(20):
        fresh = [rank_input(turn, rank, size, torch.bfloat16) for rank in range(4)]
        for part, values, output in zip(inputs, fresh, outputs, strict=True):
            part.copy_(values)
            output.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, group.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for output in outputs:
            assert_same_bits(output.cpu(), expected_sum(group, fresh), f"turn {turn}")
