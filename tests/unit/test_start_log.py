"""What a start says of its time."""

from __future__ import annotations

import logging

import pytest

from llm_allreduce_plugin.group import start_log
from llm_allreduce_plugin.group.start_log import SLOW_S, StartTimes, log_times


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(start_log.time, "monotonic", lambda: now[0])
    return now


def test_parts_add_up_and_short_ones_are_not_named(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    times = StartTimes()
    assert str(times) == "0.00 s"
    for part, seconds in (("memory", 0.25), ("board", 0.001), ("kernels", 0.5), ("memory", 0.25)):
        clock[0] += seconds
        times.ended(part)
    assert list(times.parts_s) == ["memory", "board", "kernels"]
    assert sum(times.parts_s.values()) == pytest.approx(1.001)
    caplog.set_level(logging.DEBUG)
    log_times(times)
    clock[0] += SLOW_S - 1
    times.ended("kernels")
    log_times(times)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("DEBUG", "the start took 1.00 s: memory 0.50, kernels 0.50"),
        ("INFO", "the start took 3.00 s: memory 0.50, kernels 2.50"),
    ]
