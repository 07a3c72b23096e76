"""Steps of the ranks of one host, that all ranks of a group take: all hosts do the same, or none goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.group.places import Places

_T = TypeVar("_T")


class HostAgreement(Agreement):
    """What sets memory up takes for an agreement of the ranks of a host. Values are of those; faults are of all ranks.

    Args:
        outer: of the whole group, which takes the steps and has the deadline.
        places: of this rank.
    """

    def __init__(self, outer: Agreement, places: Places) -> None:
        # Without the constructor of the class, which would begin a series of steps of its own.
        self._outer = outer
        self._places = places
        self.rank = places.index
        self.world_size = len(places.members)
        self.wait_s, self.setting, self.when = outer.wait_s, outer.setting, outer.when
        self._is_nested = False

    @property
    def abandoned(self) -> bool:  # type: ignore[override]
        """See :class:`Agreement`."""
        return self._outer.abandoned

    def gather(self, value: Any, step: str) -> list[Any]:  # noqa: ANN401
        """``value`` of every rank of the host. Collective over all hosts."""
        values = self._outer.gather(value, step)
        return [values[member] for member in self._places.members]

    def first_fault(self, fault: str | None, step: str) -> str | None:
        """The fault of the lowest rank of all hosts that has one, which says on which host."""
        named = None if fault is None else f"on host {self._places.host}, whose ranks count from 0: {fault}"
        return self._outer.first_fault(named, step)

    def from_first_rank(self, make: Callable[[], _T], step: str, raising: type[Exception]) -> _T:
        """``make()`` of the host's first rank, once it has worked on every host."""
        made: _T | None = None
        fault: str | None = None
        if self.rank == 0:
            try:
                made = make()
            except Exception as error:  # noqa: BLE001  (whatever it is, the other ranks must hear of it)
                fault = str(error) or type(error).__name__
        answers = self._outer.gather((made, fault, self._places.host), step)
        for _made, fault, host in answers:
            if fault is not None:
                message = f"on host {host}, whose ranks count from 0: {fault}"
                raise raising(message)
        result: _T = answers[self._places.members[0]][0]
        return result

    def on_every_rank(
        self, make: Callable[[], _T], step: str, raising: type[Exception], failed: str = "", *, may_block: bool = False
    ) -> _T:
        """``make()``, if it works on every rank of all hosts."""
        return self._outer.on_every_rank(make, step, raising, failed, may_block=may_block)

    def nested(self, wait_s: float, setting: str, when: str) -> HostAgreement:
        """See :class:`Agreement`."""
        inner = HostAgreement(self._outer.nested(wait_s, setting, when), self._places)
        inner._is_nested = True
        return inner

    def name_of(self, rank: int) -> str:
        """See :class:`Agreement`."""
        return f"rank {self._places.members[rank]}"

    def close(self) -> None:
        """Of one that is not nested, nothing: the steps are those of the whole group."""
        if self._is_nested:
            self._outer.close()
