"""The short run for ``compute-sanitizer``, emulated: nothing of it is wrong, and no kernel is left out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from llm_allreduce_plugin import _C
from tests.gpu import sanitizer_run
from tests.kernels.test_registry import HALVES
from tests.support import kernel_list, local_group
from tests.support.emulator import needs_emulator
from tests.support.local_group import LocalGroup
from tests.support.local_machine import EmulatedGpus, plan_on
from tests.support.norm_group import Shape, check

pytestmark = needs_emulator

# Algorithm, exchange, wire format, epilogue, and the form: of sums only "split" or "pull" where a kernel is for that.
Run = tuple[int, int, str, int, str]


def expected() -> set[Run]:
    """Of all kernels of one host, but those that go by multicast."""
    return {
        (of.algorithm, of.exchange, wire, of.epilogue, told(of))
        for of in kernel_list.ALL
        for wire in of.wires
        if of.exchange not in (_C.MULTICAST, _C.IN_SWITCH) and of.algorithm not in HALVES
    }


def told(of: kernel_list.Kernels) -> str:
    return of.form if of.epilogue == _C.RMS_NORM or of.form in ("split", "pull") else ""


def form_of_rows(exchange: int, shape: Shape, hidden: int) -> str:
    """As push_rows() of csrc/host/exchange_in_band.cu tells it."""
    if exchange == _C.SHARED:
        return "any"
    if shape.scatter_lanes:
        return "split"
    if shape.threads > _C.MAX_THREADS:
        return "wide"
    return "short" if hidden <= 8 * shape.threads * shape.cluster else "any"


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> set[Run]:
    """What runs, on emulated GPUs."""
    runs: set[Run] = set()

    def noted(*arguments: Any) -> _C.Plan:
        _, _, launch, _, _, peer_distances, pools = arguments
        split = "split" if launch.scatter_lanes + launch.drain_lanes else ""
        form = "pull" if peer_distances and pools else split
        wire = str(launch.wire_format or "raw")
        runs.add((int(launch.algorithm), int(launch.exchange), wire, _C.STORE, form))
        return plan_on(*arguments)

    def emulated(*arguments: Any, **settings: Any) -> LocalGroup:
        return LocalGroup(*arguments, machine=EmulatedGpus(1), **settings)

    def noted_rows(group: LocalGroup, algorithm: int, exchange: int, shape: Shape, inputs: Any, *others: Any) -> None:
        form = form_of_rows(exchange, shape, inputs[0].shape[1])
        runs.add((int(algorithm), exchange, "raw", _C.RMS_NORM, form))
        check(group, algorithm, exchange, shape, inputs, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(local_group, "plan_on", noted)
    monkeypatch.setattr(sanitizer_run, "LocalGroup", emulated)
    monkeypatch.setattr(sanitizer_run, "check", noted_rows)
    return runs


def test_every_kernel_that_only_sums_runs(found: set[Run]) -> None:
    sanitizer_run.main((4,), ("exact", "compressed", "several"), short=True)
    assert found == {run for run in expected() if run[3] == _C.STORE}


def test_every_kernel_that_norms_runs(found: set[Run]) -> None:
    """But not in clusters, which are not emulated: the kernel is that of a block to a row."""
    for world_size in (2, 4):
        sanitizer_run.normed(world_size, lambda _line: None, short=True, leave_out=(sanitizer_run.IN_CLUSTERS,))
    assert found == {run for run in expected() if run[3] == _C.RMS_NORM}


def test_norms_alone_run(found: set[Run]) -> None:
    """Each in a form of its own; they are in no registry."""
    lines: list[str] = []
    sanitizer_run.alone(lines.append, short=True)
    assert len(lines) == 8
    assert found == set()


def test_clusters_run_last() -> None:
    """Short and long rows; racecheck takes many minutes for them."""
    for world_size, hidden in itertools.product((2, 4), (512, 2880)):
        *others, last = sanitizer_run.normed_calls(world_size, hidden)
        assert last.name == sanitizer_run.IN_CLUSTERS
        assert last.shape.cluster > 1
        assert all(call.shape.cluster == 1 for call in others)
