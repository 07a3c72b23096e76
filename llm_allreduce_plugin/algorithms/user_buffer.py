"""UB: a two-shot that stores its results straight into the outputs of all ranks, which lie in registered memory.

Kernels: csrc/kernels/two_shot_place.cu, csrc/cpu/two_shot_place.cpp. The memory: transport/registered.py.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from llm_allreduce_plugin.algorithms import measured, tables
from llm_allreduce_plugin.algorithms.base import KernelStrategy, Merit, Message, Numerics, spread, spread_in_band
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange
from llm_allreduce_plugin.algorithms.ranges import bytes_in_words
from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.topology.links import Transport

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.decision import Launch
    from llm_allreduce_plugin.algorithms.facts import GroupFacts
    from llm_allreduce_plugin.config import AllReduceConfig

# Where nothing is set, of each rank: outputs to 128 MiB, three of them at once and one to spare. CPU ranks have it in
# shared memory, of which containers have little.
DEFAULT_GPU_POOL_BYTES = 512 << 20
DEFAULT_CPU_POOL_BYTES = 16 << 20


def pool_obstacle(config: AllReduceConfig, facts: GroupFacts) -> str | None:
    """Why a group has no registered memory, or None when it has."""
    if facts.transport is Transport.NONE:
        return facts.no_transport_reason or "ranks cannot reach each other's memory"
    if facts.num_hosts > 1:
        return f"ranks run on {facts.num_hosts} hosts, and registered memory is that of one"
    if facts.transport is Transport.HOST:
        return "ranks share host memory, and outputs lie with the GPUs"
    if facts.transport is Transport.SYMMETRIC and not facts.in_band.two_shot:
        return "in_band is off, and results are stored into outputs only where inputs travel in band"
    if facts.no_pool_reason:
        return facts.no_pool_reason
    if wanted_pool_bytes(config, facts) == 0:
        return "registered_pool is 0: there is no registered memory"
    return None


def takes_one_step(facts: GroupFacts) -> bool:
    """Whether a group stores nothing into others' outputs because one step is faster than that at every size."""
    in_band = facts.transport is Transport.SYMMETRIC and facts.num_hosts == 1 and facts.in_band.one_shot > 0
    return in_band and tables.place_pays_from(facts)[0] is None


def stores_only_here(config: AllReduceConfig, facts: GroupFacts) -> bool:
    """Whether UB was asked for and needs no registered memory for it, nor was any asked for by number."""
    is_asked_for = config.allreduce_strategy is AllReduceStrategy.UB and config.registered_pool is None
    return is_asked_for and takes_one_step(facts)


def largest_output(pool: int) -> int:
    """Of ``pool`` bytes: as much is kept for when nothing else is free."""
    return pool // 4


def wanted_pool_bytes(config: AllReduceConfig, facts: GroupFacts) -> int:
    """Registered memory of each rank that the settings ask for, in bytes."""
    if config.registered_pool is not None:
        return int(config.registered_pool)
    if config.allreduce_strategy is not AllReduceStrategy.UB or takes_one_step(facts):
        return 0
    return DEFAULT_CPU_POOL_BYTES if facts.transport is Transport.SHM else DEFAULT_GPU_POOL_BYTES


def pool_bytes(config: AllReduceConfig, facts: GroupFacts) -> int:
    """Registered memory of each rank, in bytes; 0: there is none."""
    return 0 if pool_obstacle(config, facts) is not None else wanted_pool_bytes(config, facts)


def sizes_placed(config: AllReduceConfig, facts: GroupFacts) -> tuple[int, int] | None:
    """The smallest and the largest message whose results UB, asked for by name, stores into outputs; None: of none."""
    least, size = tables.place_pays_from(facts)[0], pool_bytes(config, facts)
    return None if least is None or takes_one_step(facts) or size == 0 else (least, largest_output(size))


def memory_in_words(config: AllReduceConfig, facts: GroupFacts) -> str:
    """Where UB's outputs lie, for the log; empty where it has no part, or cannot run, which the first call says."""
    if config.allreduce_strategy is not AllReduceStrategy.UB:
        return ""
    size = pool_bytes(config, facts)
    if not takes_one_step(facts):
        fused = ". Sums with their norm in the same kernel (fuse_norm) are no outputs, and run as TWOSHOT"
        behind = fused if config.fuse_norm else ""
        return f"UB takes outputs from registered memory, {size} bytes on each rank{behind}" if size else ""
    opened = f"{size} bytes, for registered_empty alone" if size else "none is opened"
    return (
        f"UB takes one step over {facts.world_size} GPUs, as ONESHOT does, and stores into no outputs of others. "
        f"Registered memory: {opened}"
    )


class UserBuffer(KernelStrategy):
    name = AllReduceStrategy.UB
    numerics = Numerics.EXACT
    instead = (AllReduceStrategy.TWOSHOT, AllReduceStrategy.NCCL)
    algorithm = "two-shot: every rank sums its share in rank order and stores the result into all ranks' outputs"

    def candidates(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> tuple[AllReduceStrategy, ...]:  # noqa: ARG002
        return (self.name, AllReduceStrategy.ONESHOT) if takes_one_step(facts) else (self.name,)

    def obstacle(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> str | None:
        if (reason := super().obstacle(config, facts, message)) is not None:
            return reason
        if takes_one_step(facts):
            return None  # pays() says so
        return self._memory_obstacle(config, facts, message)

    def placing_obstacle(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> str | None:
        """Why results of a message cannot go into outputs of all ranks, whoever asks, or None."""
        if (reason := super().obstacle(config, facts, message)) is not None:
            return reason
        if takes_one_step(facts):
            return measured.ONE_STEP_INSTEAD
        return self._memory_obstacle(config, facts, message)

    @staticmethod
    def _memory_obstacle(config: AllReduceConfig, facts: GroupFacts, message: Message) -> str | None:
        if (reason := pool_obstacle(config, facts)) is not None:
            return reason
        if message.registered_output is False:
            return "its output does not lie in registered memory"
        if message.payload_bytes > (most := largest_output(pool_bytes(config, facts))):
            # Without this message's size: a reason is told, and counted, once.
            return f"messages above {bytes_in_words(most)}, a quarter of registered_pool, go through slots"
        return None

    def pays(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Merit:  # noqa: ARG002
        """What the group's profile says comes before the estimate. A group has one under AUTO and MINLATENCY."""
        least, source = tables.place_pays_from(facts)
        if least is None:
            return Merit(pays=False, reason=source)
        if (table := tables.registered_table_of(facts, message.element_bytes)) is not None:
            if table.range_of(message.payload_bytes)[1].strategy == self.name:
                return Merit(pays=True)
            words = f"{table.place_of(message.payload_bytes)}, where results travel faster through slots"
            return Merit(pays=False, reason=f"{words} ({table.source})")
        if message.payload_bytes >= least:
            return Merit(pays=True)
        words = f"below {bytes_in_words(least)} results travel as fast through slots ({source})"
        return Merit(pays=False, reason=words)

    def plan(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Launch:  # noqa: ARG002
        parts = facts.world_size
        if facts.transport is Transport.SHM:
            pushed = spread(message.vectors, Algorithm.TWO_SHOT, facts.flagged.two_shot, facts.lanes, parts)
        else:
            split = tables.split(self.name, parts, message.payload_bytes)
            pushed = spread_in_band(message, facts, Algorithm.TWO_SHOT, facts.in_band.two_shot, parts, split)
        return dataclasses.replace(pushed, exchange=Exchange.PLACE, drain_lanes=0)
