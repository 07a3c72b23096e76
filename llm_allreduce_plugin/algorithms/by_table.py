"""MINLATENCY and AUTO: for each size the exact kernel that a table calls the fastest on this node.

They have no kernels of their own. All exact kernels give the same bits, so they may take whichever is fastest for a
size without an answer ever depending on it. AUTO runs it under its own name; MINLATENCY stays what was asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from llm_allreduce_plugin.algorithms import tables
from llm_allreduce_plugin.algorithms.base import KernelStrategy, Merit, Message, Numerics
from llm_allreduce_plugin.algorithms.one_shot import OneShot
from llm_allreduce_plugin.algorithms.ranges import Range, Table, bytes_in_words
from llm_allreduce_plugin.algorithms.two_shot import TwoShot
from llm_allreduce_plugin.algorithms.user_buffer import UserBuffer
from llm_allreduce_plugin.config import AllReduceStrategy

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.decision import Launch
    from llm_allreduce_plugin.algorithms.facts import GroupFacts
    from llm_allreduce_plugin.config import AllReduceConfig

_PLACES = UserBuffer()
_STEPS = {AllReduceStrategy.ONESHOT: "one step beats two", AllReduceStrategy.TWOSHOT: "two steps beat one"}


class TableStrategy(KernelStrategy):
    """Chooses among kernels by a table.

    Attributes:
        among: what a table may name; all of one numeric class.
    """

    numerics = Numerics.EXACT
    spans_hosts = True
    among: ClassVar[dict[AllReduceStrategy, KernelStrategy]] = {
        kernel.name: kernel for kernel in (OneShot(), TwoShot())
    }

    def table(self, config: AllReduceConfig, facts: GroupFacts, element_bytes: int) -> Table:  # noqa: ARG002
        """The table for elements of this size, and where it comes from."""
        return tables.table_of(facts, element_bytes)

    def _why_placed(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> str | None:  # noqa: ARG002
        """Why results that may go into registered outputs do; None where a kernel without them is as fast.

        What a profile says comes first. Any message that goes elsewhere goes by the table of the others.
        """
        size = message.payload_bytes
        if (table := tables.registered_table_of(facts, message.element_bytes)) is not None:
            if table.range_of(size)[1].strategy != _PLACES.name:
                return None
            return f"{table.place_of(size)}, where results stored into registered outputs were fastest ({table.source})"
        least = tables.table_places_from(facts)
        if least is None or size < least:
            return None
        reason = f"results stored into registered outputs were faster from {bytes_in_words(least)} on"
        return f"{reason} ({facts.world_size} ranks)"

    def _find(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> tuple[AllReduceStrategy, str]:
        """The fastest for a message, and why."""
        if _PLACES.placing_obstacle(config, facts, message) is None:
            why = self._why_placed(config, facts, message)
            if why is not None:
                return _PLACES.name, why
        table = self.table(config, facts, message.element_bytes)
        fastest = AllReduceStrategy(table.range_of(message.payload_bytes)[1].strategy)
        return fastest, f"{table.place_of(message.payload_bytes)}, where {_STEPS[fastest]} ({table.source})"

    def pays(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Merit:
        return Merit(pays=True, reason=self._find(config, facts, message)[1])

    def plan(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> Launch:
        fastest, _ = self._find(config, facts, message)
        kernel = _PLACES if fastest is _PLACES.name else self.among[fastest]
        return kernel.plan(config, facts, message)


class MinLatency(TableStrategy):
    name = AllReduceStrategy.MINLATENCY
    algorithm = "the fastest exact kernel for each size on this node"


class Auto(TableStrategy):
    name = AllReduceStrategy.AUTO
    algorithm = "any exact strategy, by topology and what was measured"

    def table(self, config: AllReduceConfig, facts: GroupFacts, element_bytes: int) -> Table:
        """The setting comes before what was measured."""
        if config.one_shot_max_bytes is None:
            return super().table(config, facts, element_bytes)
        ranges = (
            Range(int(config.one_shot_max_bytes), AllReduceStrategy.ONESHOT),
            Range(None, AllReduceStrategy.TWOSHOT),
        )
        return Table(ranges, "one_shot_max_bytes")

    def _why_placed(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> str | None:
        return None if config.one_shot_max_bytes is not None else super()._why_placed(config, facts, message)

    def candidates(self, config: AllReduceConfig, facts: GroupFacts, message: Message) -> tuple[AllReduceStrategy, ...]:
        if message.element_bytes == 0:  # no kernel handles the type: no table has its sizes
            return tuple(self.among)
        fastest, _ = self._find(config, facts, message)
        return (fastest, *(name for name in self.among if name is not fastest))
