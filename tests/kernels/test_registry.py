"""Which kernel runs which call: the registry, against the list of what there must be."""

from __future__ import annotations

import itertools

import pytest

from llm_allreduce_plugin import _C
from tests.support import emulator, kernel_list

pytestmark = emulator.needs_emulator

HALVES = (_C.REDUCE, _C.REDUCE_SCATTER, _C.HOST_SUM, _C.HOST_SUM_GATHER)
ALGORITHMS = (_C.ONE_SHOT, _C.TWO_SHOT, _C.RING, _C.HIERARCHICAL, *HALVES)
EPILOGUES = (_C.STORE, _C.RMS_NORM)
EXCHANGES = (_C.PUSH, _C.SHARED, _C.FLAGS, _C.STAGED, _C.PULL, _C.PLACE, _C.MULTICAST, _C.IN_SWITCH)


WORLD_SIZES = (2, 3, 4, 5, 8, 9, 16, 72)


def compare_rows(library: emulator.Library, world_size: int) -> None:
    """What the registry finds for every combination: a kernel of the same world size comes before one of any."""
    rows = {}
    for kernel, of in kernel_list.expected():
        if kernel.world_size not in (world_size, kernel_list.ANY):
            continue
        key = (of.algorithm, of.exchange, kernel.wire, of.epilogue, kernel.type, of.form)
        row = (kernel.world_size, of.most_threads, of.extra_threads, of.resident)
        rows[key] = max(row, rows.get(key, row))
    found = {}
    for algorithm, exchange, wire, epilogue, dtype, form in itertools.product(
        ALGORITHMS, EXCHANGES, kernel_list.WIRES, EPILOGUES, kernel_list.TYPE_CODES, kernel_list.FORMS
    ):
        row = library.row(
            algorithm,
            exchange,
            kernel_list.WIRES[wire],
            epilogue,
            kernel_list.TYPE_CODES[dtype],
            world_size,
            kernel_list.FORMS.index(form),
        )
        if row is not None:
            found[algorithm, exchange, wire, epilogue, dtype, form] = row
    assert found == rows
    assert len(rows) > 30


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_each_call_has_its_kernel_or_none(world_size: int) -> None:
    compare_rows(emulator.library(), world_size)
