"""Which tests one of several workers runs: names that begin as tests/conftest.py says, and that there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TOGETHER, scope_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("begin", TOGETHER)
def test_what_runs_together_is_there(begin: str) -> None:
    path, _, function = begin.partition("::")
    assert (ROOT / path).exists() or list(ROOT.glob(f"{path}*.py"))
    assert not function or f"def {function}(" in (ROOT / path).read_text()


def test_scopes() -> None:
    alike = ("tests/cpu/test_fused.py::test_a[1]", "tests/cpu/test_plans.py::test_b")
    assert {scope_of(name) for name in alike} == {"CPU ranks"}
    ending = ("tests/cpu/test_close.py::test_a[1]", "tests/cpu/test_shared_memory.py::test_b")
    assert {scope_of(name) for name in ending} == {"CPU ranks that end"}, "one looks at what others might leave"
    assert scope_of("tests/cpu/test_norm.py::test_b") != "CPU ranks", "it has none"
    for name in ("tests/unit/test_files.py::test_a", "tests/kernels/test_exact.py::test_sizes[2-ONESHOT-in band]"):
        assert scope_of(name) == name, "any worker runs it"
