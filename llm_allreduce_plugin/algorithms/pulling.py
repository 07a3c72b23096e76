"""Calls whose input peers read in place: which of them do. Kernel: csrc/kernels/two_shot_pull.cu.

Where an input lies in memory that peers see, a two-shot need not send it: owners of a share read it where it is, and
push only the results. Messages for which one step is faster are sent as ever.
"""

from __future__ import annotations

import dataclasses

from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES, Message
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange, Launch


def obstacle(launch: Launch, message: Message) -> str | None:
    """Why peers do not read the input of a call in place that would be launched like this, or None when they can."""
    if not message.readable_in_place:
        return "it does not lie in memory that peers see"
    if launch.exchange not in {Exchange.PUSH, Exchange.PULL}:
        return "peers read in place only what would be pushed in band, through GPU memory"
    if launch.algorithm is not Algorithm.TWO_SHOT or launch.wire_format is not None:
        return "peers read in place only for an exact two-shot"
    if message.count == 0 or message.payload_bytes % VECTOR_BYTES:
        return f"{message.payload_bytes} bytes are no whole vectors of {VECTOR_BYTES} bytes"
    return None


def launch(pushed: Launch, message: Message) -> Launch:
    """How a call is launched that would push its input: by reading it in place, where that can be."""
    if obstacle(pushed, message) is not None:
        return pushed
    return dataclasses.replace(pushed, exchange=Exchange.PULL, scatter_lanes=0, drain_lanes=0)
