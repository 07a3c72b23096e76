"""Who is where, of a group on several hosts: pure, from the host of each rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Places:
    """Of one rank.

    Attributes:
        rank: in the group.
        host: its host's number.
        members: the ranks of its host, in order.
        rail: the ranks that have the same place on their hosts, in the order of hosts; it is one of them.
    """

    rank: int
    host: int
    members: tuple[int, ...]
    rail: tuple[int, ...]

    @classmethod
    def of(cls, hosts: Sequence[int], rank: int) -> Places:
        """``hosts``: the host of each rank, from 0 on, with as many ranks each."""
        by_host = [[peer for peer, host in enumerate(hosts) if host == number] for number in range(len(set(hosts)))]
        members = by_host[hosts[rank]]
        index = members.index(rank)
        return cls(rank, hosts[rank], tuple(members), tuple(ranks[index] for ranks in by_host))

    @property
    def index(self) -> int:
        """Its place on its host."""
        return self.members.index(self.rank)

    def host_of(self, rank: int) -> int:
        """Of a rank on this one's rail."""
        return self.rail.index(rank)
