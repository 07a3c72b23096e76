"""Clean-up that fails, or that must not be."""

from __future__ import annotations

import logging
import time
import weakref

import pytest

from llm_allreduce_plugin.base.cleanup import Ending, let_go, quietly


class Memory:
    """Notes down whether it was closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


class Stubborn(Memory):
    def close(self) -> None:
        message = "device is busy"
        raise RuntimeError(message)


def test_what_may_be_in_use_is_kept_and_all_else_closed() -> None:
    free, used, beside = Memory(), Memory(), Memory()
    let_go(free, in_use=False)
    assert free.closed == 1
    let_go(used, beside, in_use=True)
    assert used.closed == 0
    refs = [weakref.ref(kept) for kept in (free, used, beside)]
    del free, used, beside
    assert [ref() is None for ref in refs] == [True, False, False], "not even when nobody holds it"


def test_a_clean_up_that_fails_leaves_the_error_that_is_on_its_way(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="^first$"):
        _fails_and_cleans_up()
    assert "cannot let go of shared memory: RuntimeError: device is busy" in caplog.messages


def _fails_and_cleans_up() -> None:
    try:
        message = "first"
        raise ValueError(message)
    finally:
        let_go(Stubborn(), in_use=False)


def test_an_end_makes_every_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    ending, made = Ending(), Memory()
    began = time.monotonic()
    assert not ending.step(lambda: time.sleep(30), "wait for the device", 0.1)
    assert not ending.step(lambda: time.sleep(30), "wait for the device", 0.1, lambda: 0.4)
    assert ending.step(lambda: time.sleep(0.5), "wait for the device", 0.1, lambda: 20.0)
    assert 0.9 < time.monotonic() - began < 3
    assert ending.step(Stubborn().close, "free", 5.0)
    assert ending.step(Stubborn().close, "free")
    assert ending.step(made.close, "free")
    assert made.closed == 1
    with pytest.raises(RuntimeError, match="device is busy"):
        ending.raise_first()
    assert caplog.messages == [
        "cannot wait for the device: not done after 0.1 s",
        "cannot wait for the device: not done after 0.5 s",
        "another error at the end: RuntimeError: device is busy",
    ]
    Ending().raise_first()
    assert quietly(made.close, "free")
