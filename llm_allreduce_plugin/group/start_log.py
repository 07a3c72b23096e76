"""What the first rank's log says of a start: what runs and why, and where the time went."""

from __future__ import annotations

import logging
import time

from llm_allreduce_plugin.algorithms import staging, user_buffer
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.low_precision_algorithm import algorithm_of
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, StagedChoice
from llm_allreduce_plugin.selection.policy import table_of, uses_table
from llm_allreduce_plugin.topology.links import Transport

logger = logging.getLogger(__name__)

_SHORTEST_S = 0.005  # of a part that is worth a word
SLOW_S = 3.0  # of a start that somebody waits for


class StartTimes:
    """Where the time of a start goes, by part, on this rank. Its clock runs from when it is made.

    Attributes:
        parts_s: seconds of each part, in the order in which they first ended. A part may come more than once.
    """

    def __init__(self) -> None:
        self.parts_s: dict[str, float] = {}
        self._last = time.monotonic()

    def ended(self, part: str) -> None:
        """All since the last part ended, or since the clock started, was for this one."""
        now = time.monotonic()
        self.parts_s[part] = self.parts_s.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        """Seconds of all parts."""
        return sum(self.parts_s.values())

    def __str__(self) -> str:
        """``1.23 s: settings of all ranks 0.02, memory 0.31, kernels 0.90``, without what took no time to speak of."""
        parts = [f"{part} {seconds:.2f}" for part, seconds in self.parts_s.items() if seconds >= _SHORTEST_S]
        total = f"{self.total_s:.2f} s"
        return f"{total}: {', '.join(parts)}" if parts else total


def log_start(config: AllReduceConfig, facts: GroupFacts, sizes: str) -> None:
    """What runs and why, for the log of the first rank."""
    if (hosts := len(set(facts.hosts))) > 1:
        if facts.fabric:
            logger.info("ranks on %d hosts are in one NVLink domain, as was proved with real bytes", hosts)
        else:
            logger.info("NVLink does not join the %d hosts: %s", hosts, facts.no_fabric_reason)
    if facts.transport is Transport.NONE:
        logger.info("all-reduce over %d ranks: %s: %s", facts.world_size, sizes, facts.no_transport_reason)
        if facts.no_norm_reason:
            logger.warning("norms behind sums are computed in plain torch, which is slower: %s", facts.no_norm_reason)
        return
    where = facts.transport.in_words
    if facts.crosses_network:
        where += f" inside each of {facts.num_hosts} hosts, a network between them"
    logger.info(
        "all-reduce over %d ranks (%s, allreduce_strategy %s, sizes per rank): %s",
        facts.world_size,
        where,
        config.allreduce_strategy,
        sizes,
    )
    if config.allreduce_strategy is AllReduceStrategy.LOWPRECISION:
        choice = algorithm_of(config, facts)
        level = logging.WARNING if choice.is_fallback else logging.INFO
        logger.log(level, "LOWPRECISION runs as %s: %s", choice.algorithm, choice.reason)
    if memory := user_buffer.memory_in_words(config, facts):
        logger.info("%s", memory)
    if config.staged is StagedChoice.ON and (why := staging.refusal(config, facts)) is not None:
        logger.warning("staged is on, but nothing is staged: %s", why)
    if uses_table(config):
        logger.info("these sizes come from %s", table_of(config, facts).source)


def log_times(times: StartTimes) -> None:
    """How long the start took, for the log of the first rank: where it was slow, for everybody to see."""
    logger.log(logging.INFO if times.total_s >= SLOW_S else logging.DEBUG, "the start took %s", times)
