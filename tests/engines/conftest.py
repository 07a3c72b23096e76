"""Engine tests need vLLM; where it is missing they are skipped, and scripts/test.sh makes sure that it is not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.support.switched_off import Watch, watching


@pytest.fixture(autouse=True)
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Every process of a server has both switches against multicast.

    Engines give their processes titles, which are else written over what the kernel shows of the environment.
    """
    monkeypatch.setenv("SPT_NOENV", "1")
    with watching() as watch:
        yield watch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
