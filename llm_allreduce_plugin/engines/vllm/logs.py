"""Our lines among vLLM's, in its format and at its level."""

from __future__ import annotations

import logging

logger = logging.getLogger("llm_allreduce_plugin")


def use_vllm_logging() -> None:
    """Write where vLLM writes. Does nothing before vLLM has set its logging up, nor a second time."""
    vllm_logger = logging.getLogger("vllm")
    if vllm_logger.handlers and not logger.handlers:
        for handler in vllm_logger.handlers:
            logger.addHandler(handler)
        logger.setLevel(vllm_logger.level)
        logger.propagate = False
