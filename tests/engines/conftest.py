"""Engine tests need vLLM; where it is missing they are skipped, and scripts/test.sh makes sure that it is not."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(autouse=True)
def titles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines give their processes titles, which are else written over what the kernel shows of the environment.

    The tests' `switches` look at that.
    """
    monkeypatch.setenv("SPT_NOENV", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
