"""Our lines among an engine's, in its format and at its level."""

from __future__ import annotations

import logging

logger = logging.getLogger("llm_allreduce_plugin")


def use_logging_of(engine: str) -> None:
    """Write where the logger of this name writes. Does nothing before that is set up, nor a second time."""
    theirs = logging.getLogger(engine)
    if theirs.handlers and not logger.handlers:
        for handler in theirs.handlers:
            logger.addHandler(handler)
        logger.setLevel(theirs.level)
        logger.propagate = False
