"""Which versions of an engine this release was tried with."""

from __future__ import annotations

import re

Version = tuple[int, ...]


def untried(engine: str, version: str, first: Version, last: Version, found: str) -> str | None:
    """What to say of a version that this plugin was not tried with, or None.

    Args:
        engine: as people call it: ``"vLLM"``.
        version: of it, as it says itself.
        first: that was tried: ``(0, 26)``.
        last: that was tried, with as many numbers; what they leave out does not count.
        found: what of it was looked for and is there: ``"all hooks"``.
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    numbers = tuple(int(part or 0) for part in match.groups())[: len(first)] if match else None
    if numbers is not None and first <= numbers <= last:
        return None
    tried = " to ".join(".".join(map(str, end)) for end in (first, last))
    tested = f"{engine} {version} was not tried (this release is made for {tried})"
    return f"all-reduce: {tested}; {found} were found, so the plugin stays on"
