"""What holds in every test with CPU ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.switched_off import Watch, watching


@pytest.fixture(autouse=True)
def switches() -> Iterator[Watch]:
    """Ranks, commands and whatever they start have both switches against multicast."""
    with watching() as watch:
        yield watch
