"""Waits for exchanges between hosts on CPU ranks: in slices, and bounded."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from typing import Any, cast

import pytest
import torch

from llm_allreduce_plugin.transport import rail as rail_module
from llm_allreduce_plugin.transport.rail import Rail


class Work:
    """Done after ``seconds``, as gloo's: a wait that ends before raises. ``fault``: of an exchange that fails.

    ``seen_late``: it ends just after a wait for it has ended, before anybody asks.
    """

    def __init__(self, seconds: float, fault: str = "", *, seen_late: bool = False) -> None:
        self._ends = time.monotonic() + seconds
        self._fault = fault
        self._seen_late = seen_late

    def is_completed(self) -> bool:
        return time.monotonic() >= self._ends

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        left = self._ends - time.monotonic()
        if (timeout and left > timeout.total_seconds()) or self._seen_late:
            time.sleep(left if self._seen_late else timeout.total_seconds())
            self._seen_late = False
            message = "Operation timed out!"
            raise RuntimeError(message)
        time.sleep(max(0.0, left))
        if self._fault:
            raise RuntimeError(self._fault)
        return True


@pytest.fixture
def rail() -> Rail:
    return Rail(cast("Any", None), torch.device("cpu"), 2)


def test_an_exchange_may_take_many_slices(rail: Rail) -> None:
    looks: list[float] = []
    rail.wait(cast("Any", Work(0.7)), 5.0, lambda: looks.append(time.monotonic()))
    assert len(looks) >= 2, "looks at what else there is"


def test_one_that_ends_just_after_a_slice_has_not_failed(rail: Rail) -> None:
    rail.wait(cast("Any", Work(0.1, seen_late=True)), 5.0)


@pytest.mark.parametrize("seen_late", (False, True))
def test_what_has_failed_says_why(rail: Rail, seen_late: bool) -> None:
    with pytest.raises(RuntimeError, match="Connection closed"):
        rail.wait(cast("Any", Work(0.1, "Connection closed", seen_late=seen_late)), 5.0)


def test_no_wait_is_for_ever(rail: Rail) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="timed out"):
        rail.wait(cast("Any", Work(60.0)), 0.5)
    assert time.monotonic() - began < 2.0


def test_a_look_may_end_it(rail: Rail) -> None:
    def look() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        rail.wait(cast("Any", Work(60.0)), 5.0, look)


def test_a_closed_one_begins_nothing(rail: Rail) -> None:
    rail.close()
    with pytest.raises(RuntimeError, match="is closed"):
        rail.start(torch.empty(2), torch.empty(1), 1.0)


def test_torch_does_not_end_processes_for_an_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its watchdog would, as soon as NCCL says that the other host is gone: before anybody is named."""
    seen: dict[str, str | None] = {}
    mode, user = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT"

    class Options:
        is_high_priority_stream = False
        _timeout = timedelta(minutes=10)

    def make(_store: Any, index: int, size: int, options: Options) -> tuple[int, int]:
        seen.update({name: os.environ.get(name) for name in (mode, user, "TORCH_NCCL_DUMP_ON_TIMEOUT")})
        assert options._timeout >= timedelta(days=1)
        return index, size

    make.Options = Options  # type: ignore[attr-defined]
    monkeypatch.setattr(rail_module.c10d, "ProcessGroupNCCL", make, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.delenv(mode, raising=False)
    monkeypatch.setenv(user, "1")
    found = rail_module._backend(cast("Any", None), 1, 2, torch.device("cuda", 0), 5.0)
    assert found == (1, 2)
    assert seen == {mode: "0", user: "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    assert mode not in os.environ, "other process groups are as the user wants them"
    assert os.environ[user] == "1"
