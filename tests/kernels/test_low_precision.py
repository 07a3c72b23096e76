"""LOWPRECISION's CUDA kernels, emulated: every form and wire format, against the torch oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from tests.gpu.test_low_precision import compare
from tests.kernels.test_exact import group_of, inputs_of
from tests.support.emulator import needs_emulator, seeds
from tests.support.local_machine import EmulatedGpus
from tests.support.low_precision import ANY_OWNER, DOMAINS
from tests.support.reference import DTYPES, assert_same_bits, rank_input, special_inputs
from tests.support.rows import HIDDEN, check_rows, rows_of

pytestmark = needs_emulator

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
SIZES = (1, 31, 497, 3000, 9001)
GROUP = WireFormat.FP8_GROUP
KINDS: dict[str, dict[str, Any]] = {
    "in band, three tasks": {"split": (1, 1), "lanes": 4, "workspace_mib": 1},
    "in band, reducers drain, rounds": {"split": (2, 0), "workspace_mib": 0.15},
    "in band, no split": {"unsplit": Algorithm.TWO_SHOT, "workspace_mib": 1},
    "in band, no split, rounds": {"unsplit": Algorithm.TWO_SHOT, "workspace_mib": 0.15},
    "in band, one step": {"unsplit": Algorithm.ONE_SHOT, "workspace_mib": 1},
    "in band, one step, a packet to a warp": {"unsplit": Algorithm.ONE_SHOT, "workspace_mib": 1, "lanes": 20},
    "in band, fp8_group": {"split": (1, 1), "lanes": 4, "workspace_mib": 1, "wire_format": GROUP},
    "in band, fp8_group, no split": {
        "unsplit": Algorithm.TWO_SHOT,
        "workspace_mib": 0.15,
        "wire_format": GROUP,
    },
    "in band, fp8_group, one step": {"unsplit": Algorithm.ONE_SHOT, "workspace_mib": 0.2, "wire_format": GROUP},
    "in band, fp8_group, a packet to a warp": {
        "unsplit": Algorithm.ONE_SHOT,
        "workspace_mib": 1,
        "lanes": 20,
        "wire_format": GROUP,
    },
    "in band, one step, rounds": {"unsplit": Algorithm.ONE_SHOT, "workspace_mib": 0.2},
    "host, one step": {"unsplit": Algorithm.ONE_SHOT, "host": True, "workspace_mib": 0.5},
    **{f"flagged, {wire}": {"in_band": False, "wire_format": wire, "workspace_mib": 0.5} for wire in WireFormat},
    **{f"host, {wire}": {"host": True, "wire_format": wire, "workspace_mib": 0.5} for wire in WireFormat},
    **{
        f"staged, {wire}": {"in_band": False, "wire_format": wire, "workspace_mib": 0.5, "staged": True}
        for wire in WireFormat
    },
}
FORMS: dict[str, tuple[int, str, tuple[int, ...] | None]] = {
    **{f"ring of {size}": (size, "ring", None) for size in (2, 3, 4, 8)},
    **{f"hierarchical {name}": (len(domains), "hierarchical", domains) for name, domains in DOMAINS.items()},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_sizes(world_size: int, kind: dict[str, Any]) -> None:
    if "staged" in kind and world_size == 2:
        pytest.skip("nothing is staged")
    for seed in seeds(2):
        group = group_of(seed, world_size, kind)
        dtype = SIXTEEN_BITS[seed % 2]
        for size in SIZES:
            what = f"{dtype} x {size}, {world_size} ranks, {seed=}"
            compare(group, inputs_of(seed + size, world_size, size, dtype), what)
        compare(group, special_inputs(world_size, dtype), f"{dtype}, special values, {seed=}")


@pytest.mark.parametrize("kind", [kind for name, kind in KINDS.items() if name.startswith("in band")])
@pytest.mark.parametrize("world_size", (3, 5, 6, 7))
def test_world_sizes_known_at_run_time(world_size: int, kind: dict[str, Any]) -> None:
    """FP8 in band; every rank owns the last packet once."""
    for seed in seeds(1):
        group = group_of(seed, world_size, kind)
        dtype = SIXTEEN_BITS[seed % 2]
        for size in (*SIZES, *(497 + 496 * step for step in range(world_size - 1))):
            what = f"{dtype} x {size}, {world_size} ranks, {seed=}"
            compare(group, inputs_of(seed + size, world_size, size, dtype), what)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("memory", ("peer", "host"))
@pytest.mark.parametrize("wire", ANY_OWNER, ids=str)
def test_forms(wire: WireFormat, memory: str, form: tuple[int, str, tuple[int, ...] | None]) -> None:
    world_size, algorithm, domains = form
    for seed in seeds(1):
        where = {"host": True} if memory == "host" else {"in_band": False}
        group = group_of(seed, world_size, where, workspace_mib=0.5, wire_format=wire)
        group.use(algorithm, domains)
        for size in SIZES:
            dtype = SIXTEEN_BITS[size % 2]
            compare(group, inputs_of(seed + size, world_size, size, dtype), f"{dtype} x {size}, {seed=}")
        compare(group, special_inputs(world_size, SIXTEEN_BITS[0]), f"special values, {seed=}")


@pytest.mark.parametrize("wire", list(WireFormat), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codec_kernels_are_the_oracle(dtype: torch.dtype, wire: WireFormat) -> None:
    """What one GPU encodes and decodes by itself; odd counts."""
    codec = CODECS[wire]
    machine = EmulatedGpus(0)
    stream = machine.stream(0).cuda_stream
    patterns = torch.arange(-(1 << 15), 1 << 15, 7, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(dtype)
    for values in (patterns, rank_input(1, 0, 2_345, dtype)):
        count = len(values)
        packets = torch.full((codec.bytes_of(count) + 16,), 0xA5, dtype=torch.uint8)
        packets = packets[-packets.data_ptr() % 16 :][: codec.bytes_of(count)]
        machine.native.encode(codec.code, DTYPE_CODES[dtype], values.data_ptr(), count, packets.data_ptr(), stream)
        machine.synchronize()
        expected = codec.encode(values)
        assert torch.equal(packets, expected)
        seen = torch.full((count + 8,), 7.0, dtype=dtype)
        machine.native.decode(codec.code, DTYPE_CODES[dtype], packets.data_ptr(), count, seen.data_ptr(), stream)
        machine.synchronize()
        decoded = codec.decode(expected, count).to(dtype)
        assert (seen[count:] == 7).all(), "wrote behind the end"
        assert torch.equal(seen[:count].isnan(), decoded.isnan())
        numbers = ~decoded.isnan()
        assert torch.equal(seen[:count][numbers], decoded[numbers])


ROW_KINDS: dict[str, dict[str, Any]] = {
    "in band, three tasks": {"split": (1, 1), "lanes": 4, "workspace_mib": 1},
    "in band, no split, rounds": {"unsplit": Algorithm.TWO_SHOT, "workspace_mib": 0.15},
    "in band, one step, rounds": {"unsplit": Algorithm.ONE_SHOT, "workspace_mib": 0.2},
    "flagged": {"in_band": False, "workspace_mib": 0.5},
    "host": {"host": True, "workspace_mib": 0.5},
    "staged": {"staged": True, "in_band": False, "workspace_mib": 0.5},
}


@pytest.mark.parametrize("kind", ROW_KINDS.values(), ids=ROW_KINDS)
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_a_row_s_answer_does_not_depend_on_its_batch(world_size: int, kind: dict[str, Any]) -> None:
    """Nor on who owns it: a part of a message ends in most rows."""
    if "staged" in kind and world_size == 2:
        pytest.skip("nothing is staged")
    for seed in seeds(1):
        group = group_of(seed, world_size, kind, wire_format=GROUP)
        hidden = HIDDEN[(world_size + seed) % len(HIDDEN)] // 8  # 360, 512, 896, 1024
        hidden -= hidden % 32
        parts = [rows_of(seed, rank, hidden) for rank in range(world_size)]

        def all_reduce(index: torch.Tensor, group: Any = group, parts: list[torch.Tensor] = parts) -> torch.Tensor:
            inputs = [part[index].flatten() for part in parts]
            outputs = group.all_reduce("LOWPRECISION", inputs)
            for output in outputs[1:]:
                assert_same_bits(output, outputs[0], "another rank")
            return outputs[0].view(len(index), -1)

        check_rows(all_reduce, (1, 2, 3, 5, 9, 17, 33), seed, f"{world_size} ranks, {hidden} wide")
