"""What a probe has to say."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable


class Verdict(enum.StrEnum):
    """How good or bad it is."""

    OK = "OK"
    WARN = "WARN"  # works, but slower, or not for everyone, or cannot be told from here
    FAIL = "FAIL"  # all-reduces, or the whole engine, will not work


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of ``llm-allreduce check``.

    Attributes:
        name: what was looked at.
        verdict: how it stands.
        text: what was seen.
        advice: what to do; empty when there is nothing to do.
    """

    name: str
    verdict: Verdict
    text: str
    advice: str = ""


def ok(name: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(name, Verdict.OK, text)


def warn(name: str, text: str, advice: str) -> Finding:
    """Something to know."""
    return Finding(name, Verdict.WARN, text, advice)


def fail(name: str, text: str, advice: str) -> Finding:
    """Something to repair."""
    return Finding(name, Verdict.FAIL, text, advice)


def guarded(name: str, probe: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """What ``probe`` finds. A probe that breaks is a finding too: a diagnosis must not need one itself."""
    try:
        found = probe()
    except Exception as error:  # noqa: BLE001  (whatever this machine does to a probe, the others must run)
        text = f"could not be checked: {type(error).__name__}: {error}"
        return [warn(name, text, "nothing, if all other checks pass; otherwise check it by hand")]
    return found if isinstance(found, list) else [found]
