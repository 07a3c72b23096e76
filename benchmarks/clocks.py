"""Clock and power of GPUs while something runs, from NVML: is a step slow because its kernels are, or the clock?

A GPU at its power limit lowers its clock. What then waits less draws more, and every other kernel takes longer.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

PERIOD_S = 0.02  # between samples; a pass of a batch takes about a second
POWER_CAP = 0x4 | 0x80  # nvmlClocksEventReasonSwPowerCap, nvmlClocksThrottleReasonHwPowerBrakeSlowdown
HEAT = 0x20 | 0x40  # nvmlClocksEventReasonSwThermalSlowdown, nvmlClocksThrottleReasonHwThermalSlowdown


class Samples:
    """What was seen of some GPUs. Attributes are filled until the time is over.

    Attributes:
        sm_mhz: clocks of multiprocessors, of all GPUs, in the order in which they were read.
        reasons: bits of why a clock is not higher, alike.
        joules: of each GPU, over ``seconds``.
    """

    def __init__(self) -> None:
        self.sm_mhz: list[int] = []
        self.reasons: list[int] = []
        self.joules: list[float] = []
        self.seconds = 0.0

    def summary(self) -> dict[str, Any]:
        """Mean clock in MHz, the parts of samples at the power limit and at that of heat, and watts of a GPU."""

        def part(bits: int) -> float:
            return round(sum(bool(reason & bits) for reason in self.reasons) / len(self.reasons), 3)

        if not self.sm_mhz or not self.joules or self.seconds <= 0:
            return {"sm_mhz": None, "watts": None, "at_power_limit": None, "at_heat_limit": None}
        return {
            "sm_mhz": round(statistics.mean(self.sm_mhz)),
            "watts": round(statistics.mean(self.joules) / self.seconds, 1),
            "at_power_limit": part(POWER_CAP),
            "at_heat_limit": part(HEAT),
        }


def visible_gpus(count: int) -> list[int | str]:
    """The first ``count`` GPUs that CUDA shows: NVML's numbers, or UUIDs where CUDA_VISIBLE_DEVICES has these."""
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    shown: list[int | str] = [int(name) if name.isdigit() else name for name in named]
    return (shown or [*range(count)])[:count]


@contextlib.contextmanager
def sampled(gpus: Sequence[int | str]) -> Iterator[Samples]:
    """Read clocks and reasons of ``gpus``, by :func:`visible_gpus`, about every PERIOD_S until the block ends.

    Raises:
        pynvml.NVMLError: there is no NVML, or no such GPU.
    """
    import pynvml

    pynvml.nvmlInit()
    by_number, by_uuid = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID
    handles = [by_number(gpu) if isinstance(gpu, int) else by_uuid(gpu) for gpu in gpus]
    samples, over = Samples(), threading.Event()

    def read() -> None:
        while not over.wait(PERIOD_S):
            for handle in handles:
                samples.sm_mhz.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
                samples.reasons.append(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))

    def millijoules() -> list[int]:
        return [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles]

    reader = threading.Thread(target=read, name="clocks", daemon=True)
    before, begin = millijoules(), time.monotonic()
    reader.start()
    try:
        yield samples
    finally:
        over.set()
        reader.join()
        samples.seconds = time.monotonic() - begin
        samples.joules = [(after - first) / 1000 for first, after in zip(before, millijoules(), strict=True)]
        pynvml.nvmlShutdown()
