"""Hosts on the command line: ``--hosts 2x8``, ``--link 50GB/s``, and the table of what a network should cost."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import typer

from llm_allreduce_plugin.algorithms import host_costs
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.host_costs import Cost, Network
from llm_allreduce_plugin.algorithms.ranges import bytes_in_words
from llm_allreduce_plugin.cli.options import MOST_RANKS
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.selection.sweep import size_text
from llm_allreduce_plugin.wire import FORMATS_BETWEEN_HOSTS

HOSTS_HELP = "So many hosts like this one, joined by a network: 2x8 is two of 8 ranks."
LINK_HELP = (
    "The network of each GPU, per direction, for modelled costs: 50GB/s, 400Gb/s; of a whole host: 100Gb/s/host."
)
SIZES = (16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20)
_LINK = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT])(B|b|bit)/s(/host)?")
_UNITS = {"M": 1e6, "G": 1e9, "T": 1e12}
_BITS = 8
_MOST_BYTES_PER_S = 1e14


@dataclasses.dataclass(frozen=True)
class Hosts:
    """``number`` of them, ``ranks`` on each."""

    number: int
    ranks: int


def parse_hosts(text: str | None) -> Hosts | None:
    """``"2x8"``: two hosts of 8 ranks.

    Raises:
        typer.BadParameter: it is something else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,4})[xX](\d{1,4})", text.strip())
    if match is not None:
        hosts = Hosts(int(match[1]), int(match[2]))
        if hosts.number > 1 and hosts.ranks and hosts.number * hosts.ranks <= MOST_RANKS:
            return hosts
    message = (
        f"--hosts {text}: must be two or more hosts times ranks on each, like 2x8; up to {MOST_RANKS} ranks in all"
    )
    raise typer.BadParameter(message)


def parse_link(text: str | None) -> Network | None:
    """``"50GB/s"`` or ``"400Gb/s"``: of each GPU; ``"100Gb/s/host"``: of a host. Units are powers of 1000, as sold.

    Raises:
        typer.BadParameter: it is something else.
    """
    if text is None:
        return None
    match = _LINK.fullmatch(text.strip())
    if match is not None:
        rate = float(match[1]) * _UNITS[match[2]] / (1 if match[3] == "B" else _BITS)
        if 0 < rate <= _MOST_BYTES_PER_S:
            return Network(rate, of_host=match[4] is not None)
    message = (
        f"--link {text}: must be bytes or bits per second of each GPU, like 50GB/s or 400Gb/s, or of a whole host, "
        "like 100Gb/s/host"
    )
    raise typer.BadParameter(message)


def group_of(facts: GroupFacts) -> Hosts | None:
    """The hosts of a group, where they have as many ranks each and are joined by a network; otherwise None."""
    if facts.fabric or len(set(facts.hosts)) <= 1:
        return None
    ranks = {facts.hosts.count(host) for host in set(facts.hosts)}
    return Hosts(len(set(facts.hosts)), ranks.pop()) if len(ranks) == 1 else None


@dataclasses.dataclass(frozen=True)
class Modelled:
    """What messages should take over hosts that a network joins.

    Attributes:
        hosts: how many, of how many ranks.
        network: between them.
        inside: bytes per second that a GPU stores to peers of its host.
        element_bytes: of an element of a message.
    """

    hosts: Hosts
    network: Network
    inside: float
    element_bytes: int

    def costs(self) -> dict[int, Cost]:
        """By bytes of a message per rank."""
        hosts, network, element = self.hosts, self.network, self.element_bytes
        return {size: host_costs.cost(hosts.number, hosts.ranks, size, network, self.inside, element) for size in SIZES}

    def fields(self) -> dict[str, Any]:
        """For JSON; times in microseconds."""
        return {
            "measured": False,
            "hosts": self.hosts.number,
            "ranks_per_host": self.hosts.ranks,
            "link_bytes_per_s_of_gpu": self.network.per_gpu(self.hosts.ranks),
            "inside_bytes_per_s": self.inside,
            "latencies": host_costs.SOURCE,
            "compression_pays_from_bytes": {str(wire): size for wire, size in self.pays_from().items()},
            "costs": [
                {
                    "bytes": size,
                    "one_step_us": _us(found.one_step),
                    "two_steps_us": _us(found.two_steps),
                    "in_pieces_us": _us(found.in_pieces),
                    "pieces": found.pieces,
                    "compressed_us": {str(wire): _us(seconds) for wire, seconds in found.compressed.items()},
                }
                for size, found in self.costs().items()
            ],
        }

    def __str__(self) -> str:
        """A table for people."""
        hosts, gpu = self.hosts, self.network.per_gpu(self.hosts.ranks) / 1e9
        head = (
            f"# MODELLED, not measured: microseconds over {hosts.number} hosts of {hosts.ranks}, {gpu:.4g} GB/s to "
            f"each GPU from other hosts, {self.inside / 1e9:.4g} GB/s inside; {host_costs.SOURCE}; codecs take their "
            "time on top"
        )
        rows = [["bytes", "one step", "two steps", "in pieces", *FORMATS_BETWEEN_HOSTS]]
        for size, found in self.costs().items():
            exact = (found.one_step, found.two_steps, found.in_pieces)
            shown = [f"{_us(seconds):g}{'*' * (seconds == found.best)}" for seconds in exact]
            if found.pieces == 1:
                shown[2] = "-"
            rows.append(
                [size_text(size), *shown, *(f"{_us(found.compressed[wire]):g}" for wire in FORMATS_BETWEEN_HOSTS)]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([head, *lines, "* the fastest exact form", f"# with its codec, {self._pays_from()}"])

    def pays_from(self) -> dict[WireFormat, int | None]:
        """Bytes per rank from which each format is faster than exact sums, its codec included; None: never."""
        hosts, ranks = self.hosts.number, self.hosts.ranks
        return {
            wire: host_costs.compression_pays_from(hosts, ranks, self.network, self.inside, wire, self.element_bytes)
            for wire in FORMATS_BETWEEN_HOSTS
        }

    def _pays_from(self) -> str:
        sizes = self.pays_from().items()
        return ", ".join(
            f"{wire} {f'pays from {bytes_in_words(size)} on' if size else 'never pays'}" for wire, size in sizes
        )


def _us(seconds: float) -> float:
    """Three digits are more than a model knows."""
    return float(f"{seconds * 1e6:.3g}")
