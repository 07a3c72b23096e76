"""Which variants of a test run by default."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Parameters of a variant that runs with ``ALLREDUCE_TEST_SLOW=1`` only: a cheaper one sees what it would see."""
    return pytest.param(*values, marks=pytest.mark.slow)
