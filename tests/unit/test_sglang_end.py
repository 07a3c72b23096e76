"""The summary of a server of SGLang, whose processes it kills at the end. Without SGLang."""

from __future__ import annotations

import os

import pytest

from llm_allreduce_plugin.engines.common import summary
from llm_allreduce_plugin.engines.sglang import plugin


def test_the_summary_comes_before_a_server_kills_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(summary, "_untold", [lambda: told.append("summary")])
    plugin.before_kill(os.getpid(), include_parent=False)
    plugin.before_kill(os.getpid() + 1)
    plugin.before_kill(None)
    assert told == []
    plugin.before_kill(os.getpid())
    plugin.before_kill(os.getpid())
    assert told == ["summary"]


def test_a_summary_that_fails_stops_no_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(summary, "_untold", [lambda: 1 / 0])
    plugin.before_kill(os.getpid())
    assert "the summary at the end could not be made" in caplog.text
