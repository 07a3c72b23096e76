"""Engine tests need vLLM; where it is missing they are skipped, and scripts/test.sh makes sure that it is not.

Tests of SGLang's arguments have fixtures here, which they name themselves.
"""

from __future__ import annotations

import importlib.util

import pytest

from llm_allreduce_plugin import AllReduceConfig
from llm_allreduce_plugin.engines.sglang import flags, fusion, hooks


@pytest.fixture(autouse=True)
def titles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines give their processes titles, which are else written over what the kernel shows of the environment.

    The tests' `switches` look at that.
    """
    monkeypatch.setenv("SPT_NOENV", "1")


@pytest.fixture
def no_sglang_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's flags write variables: nothing of a test may reach the next one."""
    for field in AllReduceConfig.model_fields:
        monkeypatch.setenv(flags.variable_of(field), "")
    monkeypatch.delenv("SGLANG_ENABLE_PCIE_IPC_ALLREDUCE", raising=False)
    monkeypatch.setattr(flags, "_given", {})


@pytest.fixture
def sglang_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of groups and of layer boundaries took; in no SGLang."""
    monkeypatch.setattr(fusion, "_installed", lambda: None)
    monkeypatch.setattr(hooks, "not_applied", lambda _hooks: [])
    monkeypatch.setattr(hooks, "exists", lambda _target: False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
