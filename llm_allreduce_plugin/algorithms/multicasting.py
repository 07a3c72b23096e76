"""Calls that go by multicast: which of them do. Kernels: csrc/kernels/*_multicast.cu, two_shot_in_switch.cu.

Only ONESHOT and TWOSHOT, asked for by name: nothing was measured that AUTO or MINLATENCY could choose by.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES, Message
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange, Launch
from llm_allreduce_plugin.config import AllReduceStrategy, MulticastChoice

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.facts import GroupFacts
    from llm_allreduce_plugin.config import AllReduceConfig

UNTRIED = "which has not been run on hardware yet"
_BY_NAME = (AllReduceStrategy.ONESHOT, AllReduceStrategy.TWOSHOT)


def obstacle(config: AllReduceConfig) -> str | None:
    """Why no call of this strategy goes by multicast, or None."""
    if config.allreduce_strategy in _BY_NAME:
        return None
    return f"{config.allreduce_strategy} does not go by multicast: ask for {' or '.join(_BY_NAME)}"


def asks_for_sums_in_switch(config: AllReduceConfig) -> bool:
    """Whether any call of this strategy is to be summed in the switch, where it can."""
    return config.in_switch_sum and config.allreduce_strategy is AllReduceStrategy.TWOSHOT


def sums_in_switch(config: AllReduceConfig, facts: GroupFacts, algorithm: Algorithm) -> bool:
    """Whether the switch is to sum, and can."""
    return asks_for_sums_in_switch(config) and algorithm is Algorithm.TWO_SHOT and facts.multicast.inputs > 0


def launch(config: AllReduceConfig, facts: GroupFacts, message: Message, pushed: Launch) -> Launch:
    """How a call is launched that would be pushed: by multicast, where it is asked for and there is any."""
    multicast = facts.multicast
    if obstacle(config) is not None or pushed.exchange is not Exchange.PUSH or not multicast.results:
        return pushed
    in_switch = sums_in_switch(config, facts, pushed.algorithm)
    parts = 1 if pushed.algorithm is Algorithm.ONE_SHOT else facts.world_size
    room = multicast.one_shot if parts == 1 else multicast.results // parts
    if in_switch:
        room = min(room, multicast.inputs // parts)
    chunk = min(pushed.chunk_vectors, room // VECTOR_BYTES)
    changed = dataclasses.replace(
        pushed,
        exchange=Exchange.IN_SWITCH if in_switch else Exchange.MULTICAST,
        chunk_vectors=chunk,
        rounds=max(1, math.ceil(message.vectors / (chunk * parts))),
    )
    if parts == 1 or in_switch:  # no lanes have one task there
        changed = dataclasses.replace(changed, scatter_lanes=0, drain_lanes=0)
    return changed


def in_words(config: AllReduceConfig, facts: GroupFacts, algorithm: Algorithm) -> str:
    """What becomes of the setting, for the reason of a decision; empty where nobody asked."""
    if config.multicast is MulticastChoice.OFF or obstacle(config) is not None:
        return ""
    if not facts.multicast.results:
        return f"not by multicast: {facts.no_multicast_reason}"
    if sums_in_switch(config, facts, algorithm):
        return f"summed in the switch (in_switch_sum), {UNTRIED}"
    stored = f"one multicast store for what is for all ranks, {UNTRIED}"
    if config.in_switch_sum and not asks_for_sums_in_switch(config):
        return f"{stored}; in_switch_sum is of {AllReduceStrategy.TWOSHOT} alone"
    return stored
