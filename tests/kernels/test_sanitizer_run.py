"""The short run for ``compute-sanitizer``, emulated: nothing of it is wrong, and no kernel is left out."""

from __future__ import annotations

from typing import Any

import pytest

from llm_allreduce_plugin import _C
from tests.gpu import sanitizer_run
from tests.kernels.test_registry import HALVES
from tests.support import kernel_list, local_group
from tests.support.emulator import needs_emulator
from tests.support.local_group import LocalGroup
from tests.support.local_machine import EmulatedGpus, plan_on

pytestmark = needs_emulator

# Algorithm, exchange, wire format, and "split" or "pull" where a kernel is for that.
Run = tuple[int, int, str, str]


def expected() -> set[Run]:
    """Of all kernels of one host, but those that go by multicast and those that norm."""
    return {
        (of.algorithm, of.exchange, wire, of.form if of.form in ("split", "pull") else "")
        for of in kernel_list.ALL
        for wire in of.wires
        if of.epilogue == _C.STORE and of.exchange not in (_C.MULTICAST, _C.IN_SWITCH) and of.algorithm not in HALVES
    }


def test_every_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[Run] = set()

    def noted(*arguments: Any) -> _C.Plan:
        _, _, launch, _, _, peer_distances, pools = arguments
        split = "split" if launch.scatter_lanes + launch.drain_lanes else ""
        form = "pull" if peer_distances and pools else split
        found.add((int(launch.algorithm), int(launch.exchange), str(launch.wire_format or "raw"), form))
        return plan_on(*arguments)

    def emulated(*arguments: Any, **settings: Any) -> LocalGroup:
        return LocalGroup(*arguments, machine=EmulatedGpus(1), **settings)

    monkeypatch.setattr(local_group, "plan_on", noted)
    monkeypatch.setattr(sanitizer_run, "LocalGroup", emulated)
    sanitizer_run.main((4,), ("exact", "compressed", "several"), short=True)
    assert found == expected()
