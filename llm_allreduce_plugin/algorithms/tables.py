"""Which exact kernel is the fastest for a size, and other answers from what was measured, for any group.

A profile comes before the numbers of ``measured``, which know some world sizes and GPUs; the others go by the nearest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from llm_allreduce_plugin.algorithms import measured, network
from llm_allreduce_plugin.algorithms.facts import PAIR
from llm_allreduce_plugin.algorithms.link_scale import link_scale
from llm_allreduce_plugin.algorithms.measured import Split
from llm_allreduce_plugin.algorithms.ranges import Table
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.topology.links import TopologyClass, Transport

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.facts import GroupFacts

_T = TypeVar("_T")
_ESTIMATE = ": an estimate"


def _tabulated(table: Mapping[int, object], world_size: int) -> int:
    """The next larger tabulated world size, or the largest."""
    return next((size for size in table if world_size <= size), max(table))


def _of(table: Mapping[int, _T], world_size: int) -> _T:
    return table[_tabulated(table, world_size)]


def host_in_band_bytes(strategy: str, world_size: int) -> int:
    """Largest message that a strategy sends in band through host memory."""
    return _of(measured.HOST_IN_BAND_BYTES[strategy], world_size)


def flagged_lanes(strategy: str, facts: GroupFacts, payload_bytes: int) -> int:
    """Blocks that a kernel with flags may have, of those that the workspace has lanes for."""
    if facts.transport is not Transport.HOST:
        return facts.lanes
    steps = _of(measured.HOST_LANES[strategy], facts.world_size)
    return min(facts.lanes, next(most for limit, most in steps if limit is None or payload_bytes <= limit))


def vectors_per_thread(transport: Transport) -> int | None:
    """Vectors of each thread in a chunk of a kernel with flags: short chunks keep PCIe busy both ways."""
    return 1 if transport is Transport.HOST else None


def table_of(facts: GroupFacts, element_bytes: int) -> Table:
    """The table for a group, measured or seed; its source says which."""
    if facts.tuned is not None:
        return facts.tuned.table(element_bytes)
    if facts.crosses_network:
        return network.table(facts, element_bytes)
    if facts.transport is Transport.HOST:
        table = _of(measured.HOST, facts.world_size)
    else:
        in_band = facts.in_band.two_shot > 0
        table = fastest(facts.world_size, facts.architecture, in_band=in_band, topology_class=facts.topology_class)
    source = table.source + (_ESTIMATE if table.source.startswith("measured") and not _is_as_measured(facts) else "")
    known = facts.topology_class is not TopologyClass.UNKNOWN
    over = f" over {facts.topology_class.in_words}" if known else ""
    return Table(table.ranges, f"the seed table for {facts.world_size} ranks{over}: {source}")


def _is_as_measured(facts: GroupFacts) -> bool:
    """Whether a group has GPUs, and links between them, like those on which numbers were measured."""
    is_slower = facts.topology_class is TopologyClass.PCIE_PEER
    return facts.device == "cuda" and facts.architecture == measured.MEASURED_ARCHITECTURE and not is_slower


def _links_in_words(architecture: int | None, scale: float) -> str:
    """What numbers are scaled for."""
    return f"sm_{architecture}" if scale != measured.PCIE_SCALE else "PCIe"


def fastest(
    world_size: int,
    architecture: int | None,
    *,
    in_band: bool,
    topology_class: TopologyClass = TopologyClass.UNKNOWN,
) -> Table:
    """The seed for any group: the next larger tabulated world size, or the largest; scaled to the GPU's links.

    But for two ranks, whose table says nothing of links.
    """
    if not in_band:
        return _of(measured.FLAGGED_B200 if architecture in measured.B200 else measured.FLAGGED, world_size)
    table = _of(measured.H200, world_size)
    scale = link_scale(architecture, topology_class)
    if scale == 1.0:
        return table
    if world_size <= PAIR:
        return measured.TWO_RANKS_ELSEWHERE
    ranges = tuple(
        dataclasses.replace(found, max_bytes=found.max_bytes and int(found.max_bytes * scale)) for found in table.ranges
    )
    return Table(ranges, f"scaled by {scale} from H200 for {_links_in_words(architecture, scale)}{_ESTIMATE}")


def split(strategy: str, world_size: int, payload_bytes: int) -> Split | None:
    """How the lanes of a large message share the tasks out; None: they do not."""
    splits = _of(measured.SPLITS[strategy], world_size)
    return next((split for split in reversed(splits) if payload_bytes >= split.min_bytes), None)


def pushing_warps(facts: GroupFacts) -> int:
    """Of fused one-shot over two ranks, warps that only push, of a grid of ``measured.LARGEST_GRID``."""
    return next(warps for name, warps in measured.PUSHING_WARPS.items() if name in facts.gpu_name)


def place_pays_from(facts: GroupFacts) -> tuple[int | None, str]:
    """The smallest message for which results are stored into registered outputs, and how that is known; None: none."""
    if facts.transport is Transport.SHM:
        return 0, "CPU ranks store everything"
    least = _of(measured.PLACE_PAYS_FROM, facts.world_size)
    return least, measured.ONE_STEP_INSTEAD if least is None else measured.PLACE_SOURCE


def registered_table_of(facts: GroupFacts, element_bytes: int) -> Table | None:
    """The table for messages whose results may go into registered outputs; None: the group's profile has none."""
    return None if facts.tuned is None else facts.tuned.registered_table(element_bytes)


def table_places_from(facts: GroupFacts) -> int | None:
    """The smallest such message where no profile says, in AUTO and MINLATENCY; None: none was measured to be faster."""
    if facts.transport is not Transport.SYMMETRIC or facts.world_size not in measured.TABLE_PLACES_FROM:
        return None
    return measured.TABLE_PLACES_FROM[facts.world_size]


def low_precision_pays_from(facts: GroupFacts, wire_format: str, element_bytes: int = 2) -> tuple[int | None, str]:
    """The smallest message per rank for which compression is faster, and how that is known; None: for none it is.

    ``element_bytes``: of the message; only between hosts sums are of another size than that.
    """
    if facts.transport is Transport.SHM:
        return 0, "CPU ranks compress everything"
    if facts.crosses_network:
        return network.compression_pays_from(facts, WireFormat(wire_format), element_bytes)
    if (facts.transport, wire_format) not in measured.LOW_PRECISION_PAYS_FROM:
        return None, f"{wire_format} was not measured over {facts.transport} memory"
    sizes = measured.LOW_PRECISION_PAYS_FROM[facts.transport, wire_format]
    tabulated = _tabulated(sizes, facts.world_size)
    size, source = sizes[tabulated]
    if facts.world_size != tabulated:
        source += f" with {tabulated} ranks"
    symmetric = facts.transport is Transport.SYMMETRIC
    scale = link_scale(facts.architecture, facts.topology_class) if symmetric else 1.0
    if scale != 1.0:
        source += f", scaled by {scale} for {_links_in_words(facts.architecture, scale)}"
    if facts.world_size != tabulated or not _is_as_measured(facts):
        source += _ESTIMATE
    return int(size * scale), source


def fused_one_step_bytes(facts: GroupFacts) -> int:
    """The largest message that one kernel takes in one step though its sum alone takes two; of more than two ranks."""
    return _of(measured.FUSED_ONE_STEP_BYTES, facts.world_size)


def fused_pays(algorithm: str, facts: GroupFacts) -> tuple[tuple[int, int | None] | None, str]:
    """The smallest and the largest message for which one kernel for sum and norm is faster than two, and the source.

    No largest: from the smallest on at every size. None instead of both: at no size.
    """
    through_host = facts.transport is Transport.HOST
    sizes = _of(measured.FUSED_PAYS[facts.transport, algorithm], facts.world_size)
    if (source := measured.FUSED_SOURCES.get((facts.transport, facts.world_size))) is not None:
        return sizes, source if _is_as_measured(facts) else source + _ESTIMATE
    through = " through host memory" if through_host else ""
    unknown = f"one kernel or two was not measured for {facts.world_size} ranks{through}"
    if sizes is not None and sizes[0] == 0:
        return sizes, unknown
    return sizes, f"an estimate from {'2 and 4' if through_host else '4'} ranks: {unknown}"
