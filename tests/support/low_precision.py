"""What a LOWPRECISION launch must compute: the oracle of its algorithm."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Algorithm, Launch
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.oracle.hierarchical import hierarchical_sum
from llm_allreduce_plugin.oracle.one_shot import one_step_sum
from llm_allreduce_plugin.oracle.ring import ring_sum
from llm_allreduce_plugin.oracle.two_shot import compressed_sum
from tests.support.launches import owned_vectors
from tests.support.reference import assert_same_bits

# Two domains of equal size, as numbers of ranks in a row and in turns.
DOMAINS = {
    "2+2": (0, 0, 1, 1),
    "2+2 in turns": (1, 0, 1, 0),
    "3+3": (0, 0, 0, 1, 1, 1),
    "3+3 around": (7, 2, 2, 2, 7, 7),  # rank 0's successor in the ring is its counterpart, unlike its predecessors
    "4+4": (0, 0, 0, 0, 1, 1, 1, 1),
    "4+4 in turns": (0, 1, 0, 1, 0, 1, 0, 1),
}


# Formats of rings and hierarchies: the others' answer for a row does not depend on who owns it.
ANY_OWNER = tuple(wire for wire in WireFormat if not wire.keeps_rows)


def oracle(
    algorithm: int, inputs: Sequence[torch.Tensor], wire: WireFormat, chunk: int, domains: Sequence[int] = ()
) -> torch.Tensor:
    """The sum by one algorithm, on the CPU; ``chunk``: packets that one part after another has, over all lanes."""
    if algorithm == _C.ONE_SHOT:
        return one_step_sum(inputs, wire)
    if algorithm == _C.RING:
        return ring_sum(inputs, wire, chunk)
    if algorithm == _C.HIERARCHICAL:
        return hierarchical_sum(inputs, wire, domains, chunk)
    return compressed_sum(inputs, wire, chunk)


def expected_sum(launch: Launch, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """What every rank gets of a launch."""
    assert launch.wire_format is not None
    codec = CODECS[launch.wire_format]
    ring = launch.algorithm is Algorithm.RING
    unit = codec.packet_values * inputs[0].element_size() if ring else codec.packet_bytes
    chunk = owned_vectors(launch) * _C.VECTOR_BYTES // unit
    return oracle(int(launch.algorithm), inputs, launch.wire_format, chunk, launch.domains)


def assert_same_numbers(output: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """NaN in the same places, and the same bits in all others."""
    assert torch.equal(output.isnan(), expected.isnan()), what
    numbers = ~expected.isnan()
    assert_same_bits(output[numbers], expected[numbers], what)
