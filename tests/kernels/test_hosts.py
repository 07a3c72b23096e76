"""The halves of an all-reduce over several hosts, emulated: every form, against the sum in host order."""

from __future__ import annotations

import random

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle.hosts import compressed_host_sum, host_ordered_sum
from llm_allreduce_plugin.wire import FORMATS_BETWEEN_HOSTS
from tests.support.emulator import BrokenContextError, needs_emulator, seeds
from tests.support.host_group import HostGroup
from tests.support.hosts import telling_inputs
from tests.support.local_machine import EmulatedGpus
from tests.support.reference import DTYPES, assert_same_bits, rank_input, special_inputs

pytestmark = needs_emulator

SIZES = (1, 7, 8, 9, 520, 1023, 4099)
SHAPES = ((2, 2), (3, 2), (2, 1), (2, 3), (2, 5))  # hosts, ranks of each


def hosts_of(group: HostGroup) -> list[int]:
    return [rank // group.ranks for rank in range(group.world_size)]


def compare(group: HostGroup, inputs: list[torch.Tensor], what: str, *, two_steps: bool, chunk: int = 1 << 20) -> None:
    expected = host_ordered_sum(inputs, hosts_of(group))
    for rank, output in enumerate(group.all_reduce(inputs, two_steps=two_steps, chunk=chunk)):
        assert_same_bits(output, expected, f"{what}, rank {rank} of {group.hosts} x {group.ranks}")


@pytest.mark.parametrize("two_steps", (False, True), ids=("one step", "two steps"))
@pytest.mark.parametrize("shared", (False, True), ids=("peers", "host memory"))
@pytest.mark.parametrize(("hosts", "ranks"), SHAPES)
def test_sizes(hosts: int, ranks: int, shared: bool, two_steps: bool) -> None:
    for seed in seeds(1):
        group = HostGroup(EmulatedGpus(seed), hosts, ranks, shared=shared)
        for dtype in DTYPES:
            for size in SIZES:
                inputs = telling_inputs(seed * 97 + size, group.world_size, size, dtype)
                # Few vectors to a chunk: many rounds, more than there are generations of slots.
                compare(group, inputs, f"{dtype} {size}, {seed=}", two_steps=two_steps, chunk=(1 << 20, 3)[size > 1000])


@pytest.mark.parametrize("wire", FORMATS_BETWEEN_HOSTS)
@pytest.mark.parametrize(("hosts", "ranks"), ((2, 1), (2, 3), (3, 2)))
def test_compressed_between_hosts(hosts: int, ranks: int, wire: WireFormat) -> None:
    """Halves and codecs, one after another: parts that end within a packet, and ranks without a part."""
    for seed in seeds(1):
        group = HostGroup(EmulatedGpus(seed), hosts, ranks)
        for dtype in (torch.bfloat16, torch.float16):
            for size in (1, 9, 497, 1025, 4099):
                inputs = [rank_input(seed + size, rank, size, dtype) for rank in range(group.world_size)]
                expected = compressed_host_sum(inputs, wire, hosts_of(group))
                for rank, output in enumerate(group.all_reduce(inputs, two_steps=True, chunk=40, wire=wire)):
                    assert_same_bits(output, expected, f"{wire} {dtype} {size}, rank {rank} of {hosts} x {ranks}")


@pytest.mark.parametrize("shared", (False, True), ids=("peers", "host memory"))
def test_special_values_and_unaligned_tensors(shared: bool) -> None:
    group = HostGroup(EmulatedGpus(3), 2, 2, shared=shared)
    for dtype in DTYPES:
        for first in (0, 1):
            inputs = [part[first:] for part in special_inputs(4, dtype)]
            for two_steps in (False, True):
                compare(group, inputs, f"{dtype} from {first}", two_steps=two_steps)


@pytest.mark.parametrize("shared", (False, True), ids=("peers", "host memory"))
def test_any_sequence_of_halves(shared: bool) -> None:
    """Slots, flags and epochs are ONESHOT's: every half finds them as every other has left them."""
    for seed in seeds(2):
        generator = random.Random(seed)
        group = HostGroup(EmulatedGpus(seed), 2, 3, shared=shared, lanes=3)
        for call in range(12):
            size, chunk = generator.choice((3, 200, 1500)), generator.choice((1, 2, 40))
            inputs = telling_inputs(seed * 31 + call, 6, size, generator.choice(DTYPES))
            compare(group, inputs, f"call {call}, {seed=}", two_steps=generator.random() < 0.5, chunk=chunk)
        for workspace in group.workspaces:
            assert workspace.exchanges() == (12, 12)


def test_nothing_sums_what_a_failed_exchange_has_brought() -> None:
    for second in (_C.HOST_SUM, _C.HOST_SUM_GATHER):
        group = HostGroup(EmulatedGpus(1), 2, 2)
        count = 64
        sums = [torch.zeros(256) for _ in range(4)]
        inputs = [torch.ones(count) for _ in range(4)]
        group.run(_C.REDUCE, inputs, sums, count, torch.float32, 16)
        plan = group.machine.native.Plan(
            group.workspaces[0], algorithm=second, exchange=_C.FLAGS, count=count, dtype=0, lanes=2, threads=32,
            chunk_vectors=16, hosts=2,
        )  # fmt: skip
        assert plan(sums[0].data_ptr(), inputs[0].data_ptr(), group.streams[0].cuda_stream) == 0  # under way, ...
        group.workspaces[0].fail_exchange(1.0)  # ... and the host finds that the exchange before it has failed
        with pytest.raises(BrokenContextError):
            group.machine.synchronize()
        assert plan(sums[0].data_ptr(), inputs[0].data_ptr(), group.streams[0].cuda_stream) == _C.STATUS_TIMEOUT


def test_calls_that_no_half_is() -> None:
    group = HostGroup(EmulatedGpus(1), 2, 2)
    tensor = torch.zeros(64)
    address = tensor.data_ptr()

    def status(**wrong: int) -> int:
        what = {"algorithm": _C.HOST_SUM, "hosts": 2, "chunk_vectors": 1, "epilogue": _C.STORE} | wrong
        plan = group.machine.native.Plan(
            group.workspaces[0], exchange=_C.FLAGS, count=8, dtype=0, lanes=1, threads=32, **what
        )
        return int(plan(address, address + 128, group.streams[0].cuda_stream))

    assert status() == 0
    group.machine.synchronize()
    slot = group.layout.flagged.one_shot_bytes // _C.VECTOR_BYTES
    for wrong in ({"hosts": 0}, {"hosts": _C.MAX_HOSTS + 1}, {"algorithm": _C.REDUCE}, {"chunk_vectors": slot + 1}):
        with pytest.raises(RuntimeError, match="invalid argument"):
            status(**wrong)
