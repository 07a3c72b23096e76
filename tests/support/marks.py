"""Which variants of a test run by default."""

from __future__ import annotations

import os
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Parameters of a variant that runs with ``ALLREDUCE_TEST_SLOW=1`` only: a cheaper one sees what it would see."""
    return pytest.param(*values, marks=pytest.mark.slow)


def wants_slow() -> bool:
    """Whether the variants that are marked slow run, too."""
    return os.environ.get("ALLREDUCE_TEST_SLOW", "0") not in ("", "0")
