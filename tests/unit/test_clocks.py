"""What benchmarks say of the clocks of GPUs."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from benchmarks import clocks


class Nvml:
    """Two GPUs, of which the second is at its power limit, and draws 500 W. Every read says that it was made."""

    NVML_CLOCK_SM = 1

    def __init__(self) -> None:
        self.open = 0
        self.reads = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-0": 0, "GPU-1": 1}[uuid]

    def nvmlDeviceGetClockInfo(self, handle: int, which: int) -> int:
        assert which == self.NVML_CLOCK_SM
        self.reads += 1
        return (1980, 1500)[handle]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return (0x0, 0x4)[handle]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return round(time.monotonic() * 1000 * (300, 500)[handle])


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(clocks, "PERIOD_S", 0.001)
    return fake


def until_read(nvml: Nvml) -> None:
    until = time.monotonic() + 10
    while nvml.reads < 20 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.02)  # so that energy is more than a rounding


def test_clock_power_and_what_limits_it(nvml: Nvml) -> None:
    with clocks.sampled([0, "GPU-1"]) as samples:
        until_read(nvml)
    found = samples.summary()
    assert found["sm_mhz"] == pytest.approx(1740, abs=1)
    assert found["watts"] == pytest.approx(400, rel=0.2)
    assert (found["at_power_limit"], found["at_heat_limit"]) == (pytest.approx(0.5), 0.0)
    assert nvml.open == 0
    reads = nvml.reads
    time.sleep(0.02)
    assert nvml.reads == reads  # nothing reads on


def test_an_error_inside_ends_the_reading(nvml: Nvml) -> None:
    def fail() -> None:
        message = "inside"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="inside"), clocks.sampled([1]):
        fail()
    assert nvml.open == 0


def test_nothing_seen_is_said_as_nothing() -> None:
    assert set(clocks.Samples().summary().values()) == {None}


@pytest.mark.parametrize(
    ("shown", "count", "numbers"),
    [("", 2, [0, 1]), ("2,3", 2, [2, 3]), ("3, 1,0", 2, [3, 1]), ("GPU-12ab,GPU-34cd", 2, ["GPU-12ab", "GPU-34cd"])],
)
def test_gpus_by_nvml_s_numbers(monkeypatch: pytest.MonkeyPatch, shown: str, count: int, numbers: Any) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert clocks.visible_gpus(count) == numbers
