"""What came of a start that fails at its end: all is let go of, but for what a GPU may still use."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.group.start import Opened
from llm_allreduce_plugin.topology.links import Transport


class Part:
    """Of what was opened."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self, _wait_s: float = 0.0) -> None:
        self.closed += 1


@pytest.mark.parametrize("in_use", (False, True))
def test_what_a_gpu_may_still_use_stays(caplog: pytest.LogCaptureFixture, in_use: bool) -> None:
    """Freeing it would wait for a kernel that may never end."""
    memory, workspace, pool, board = parts = [Part() for _ in range(4)]
    held: dict[str, Any] = {"memory": memory, "workspace": workspace, "pool": pool, "board": board}
    opened = Opened(GroupFacts(2, "cuda", Transport.SYMMETRIC), **held)
    with caplog.at_level(logging.WARNING):
        opened.close(in_use=in_use)
    assert [part.closed for part in parts] == ([0, 1, 0, 1] if in_use else [1, 1, 1, 1])
    assert ("memory is kept until this process ends" in caplog.text) == in_use
    assert opened.memory is opened.workspace is opened.pool is None
