"""Which exact kernel is the fastest for a size: what a profile measured, and seed tables where there is none.

One-shot sends (N-1) * S per link direction, two-shot 2 (N-1)/N * S at the price of a second step (about 1 us on
NVLink). With two ranks both send S, so one-shot wins again where the second step no longer hides in the first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from llm_allreduce_plugin.topology.links import TopologyClass, Transport

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.facts import GroupFacts

_T = TypeVar("_T")

KIB = 1024
MIB = 1024 * KIB


@dataclasses.dataclass(frozen=True)
class Range:
    """Messages up to ``max_bytes`` per rank (None: all larger ones) are fastest with ``strategy``."""

    max_bytes: int | None
    strategy: str  # "ONESHOT" or "TWOSHOT"


@dataclasses.dataclass(frozen=True)
class Table:
    """The ranges of one world size, in rising order, and where they come from."""

    ranges: tuple[Range, ...]
    source: str

    def range_of(self, payload_bytes: int) -> tuple[int, Range]:
        """The range of a message, with the size above which it begins."""
        below = 0
        for found in self.ranges:
            if found.max_bytes is None or payload_bytes <= found.max_bytes:
                return below, found
            below = found.max_bytes
        raise AssertionError(self)  # the last range has no limit


@dataclasses.dataclass(frozen=True)
class TunedRanges:
    """What was measured for elements of one size."""

    element_bytes: int
    ranges: tuple[Range, ...]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a profile says about one group.

    Attributes:
        source: which profile, and when it was measured.
        ranges: by size of an element; at least one.
    """

    source: str
    ranges: tuple[TunedRanges, ...]

    def table(self, element_bytes: int) -> Table:
        """For elements of this size, or of the one that was measured: what counts is bytes, additions hardly do."""
        found = next((found for found in self.ranges if found.element_bytes == element_bytes), self.ranges[0])
        return Table(found.ranges, self.source)


def _changeover(max_bytes: int, source: str) -> Table:
    return Table((Range(max_bytes, "ONESHOT"), Range(None, "TWOSHOT")), source)


def between(anchors: Mapping[int, int], world_size: int) -> int:
    """Bytes for a world size from those of others, in rising order: on a line between the logarithms of two.

    Beyond the last one inverse to the square of the world size: what one-shot sends and what it reads both grow with
    it. Below the first one, the first's.
    """
    sizes = list(anchors)
    if world_size <= sizes[0]:
        return anchors[sizes[0]]
    if world_size >= sizes[-1]:
        return anchors[sizes[-1]] * sizes[-1] * sizes[-1] // (world_size * world_size)
    above = next(i for i, size in enumerate(sizes) if size >= world_size)
    low, high = sizes[above - 1], sizes[above]
    share = math.log(world_size / low) / math.log(high / low)
    return round(math.pow(anchors[low], 1 - share) * math.pow(anchors[high], share))


_MEASURED = "measured on H200"
_MEASURED_FLAGGED = "measured on H200 with kernels that wait for flags"
_BETWEEN = "an estimate between 2 and 4 ranks"
_BEYOND = "an estimate beyond 4 ranks"
_ESTIMATE = "an estimate: a step of about 1 us against the traffic that one-shot sends more at 350 GB/s"

# In band, on one NVSwitch node of H200. 2 and 4 ranks are measured: between the last power of two at which the one and
# the first at which the other is faster, where their lines cross. The others are estimates, scaled to meet them.
H200 = {
    2: Table(
        # As far as the largest grid has a thread for each vector; TWOSHOT has half as many to a rank.
        (Range(2 * MIB, "ONESHOT"), Range(4 * MIB, "TWOSHOT"), Range(None, "ONESHOT")),
        _MEASURED,
    ),
    3: _changeover(416 * KIB, _ESTIMATE),
    4: _changeover(192 * KIB, _MEASURED),
    5: _changeover(112 * KIB, _ESTIMATE),
    6: _changeover(80 * KIB, _ESTIMATE),
    7: _changeover(64 * KIB, _ESTIMATE),
    8: _changeover(52 * KIB, _ESTIMATE),
    16: _changeover(20 * KIB, _ESTIMATE),
}

# How much more (or less) than an H200 another GPU's links carry in the time of one step; none of it measured here.
PCIE_SCALE = 0.1
LINK_SCALE = {
    80: 0.65,  # A100: NVLink 3, 300 GB/s per direction
    86: PCIE_SCALE,  # PCIe cards from here ...
    89: PCIE_SCALE,
    90: 1.0,  # H100, H200: NVLink 4, 450 GB/s
    100: 2.0,  # B200: NVLink 5, 900 GB/s
    103: 2.0,
    120: PCIE_SCALE,  # ... and here
}

# Kernels that wait for flags: CPU ranks, and GPUs with in_band off. 2 and 4 ranks measured on H200
# (benchmarks/h200/latency_tp{2,4}.json), the others estimated.
FLAGGED = {
    2: _changeover(2 * MIB, _MEASURED_FLAGGED),
    3: _changeover(1 * MIB, _BETWEEN),
    4: _changeover(512 * KIB, _MEASURED_FLAGGED),
    5: _changeover(320 * KIB, _BEYOND),
    6: _changeover(224 * KIB, _BEYOND),
    7: _changeover(160 * KIB, _BEYOND),
    8: _changeover(128 * KIB, _BEYOND),
    16: _changeover(32 * KIB, _BEYOND),
}

# Kernels that wait for flags on B200 and B300: FlashInfer's limits (its pull request 1972, measured on B200): one-shot
# while tokens * hidden * 2 * tp * itemsize, which is 2 * tp messages, is at most so many MiB. Its one-shot polls the
# data as ours in band does; its two-shot waits at two barriers as our kernels with flags do, which is what these limits
# weigh. In band two-shot has no barrier and pays from far smaller messages (on H200 with 4 ranks from 192 KiB on, where
# FlashInfer's limit says 8 MiB and its own two-shot is nearly twice as fast at 2 MiB), so that H200's table, scaled to
# the links, is nearer. The limits are upper bounds: our one-shot with flags is slower than the one that was measured.
FLASHINFER_B200_MIB = {2: 512, 4: 64, 8: 42}
_FLASHINFER_BYTES = {size: limit * MIB // (2 * size) for size, limit in FLASHINFER_B200_MIB.items()}
_FLASHINFER = "FlashInfer's limits for B200, where two-shot waits at barriers"
FLAGGED_B200 = {
    size: _changeover(
        between(_FLASHINFER_BYTES, size),
        _FLASHINFER if size in _FLASHINFER_BYTES else f"an estimate from {_FLASHINFER}",
    )
    for size in FLAGGED
}
_B200 = (100, 103)

# Through pinned host memory.
HOST = {
    2: Table((Range(None, "ONESHOT"),), "measured on H200 through host memory"),
    3: _changeover(128 * KIB, _BETWEEN),
    4: _changeover(64 * KIB, "measured on H200 through host memory"),
    5: _changeover(48 * KIB, _BEYOND),
    6: _changeover(32 * KIB, _BEYOND),
    7: _changeover(32 * KIB, _BEYOND),
    8: _changeover(24 * KIB, _BEYOND),
    16: _changeover(8 * KIB, _BEYOND),
}

# Through host memory: the largest message whose readiness travels inside the data.
HOST_IN_BAND_BYTES = {
    "ONESHOT": {2: 256 * KIB, 4: 256 * KIB, 16: 64 * KIB},
    "TWOSHOT": {2: 256 * KIB, 4: 512 * KIB, 16: 256 * KIB},
    "LOWPRECISION": {16: 1 * MIB},
}
# Blocks of a kernel with flags through host memory, by size; measured on H200 with 2 and 4 ranks.
_HOST_LANES = {2: ((1 * MIB, 32), (None, 64)), 4: ((8 * MIB, 32), (None, 64))}
HOST_LANES: dict[str, Mapping[int, tuple[tuple[int | None, int], ...]]] = {
    "ONESHOT": _HOST_LANES,
    "TWOSHOT": _HOST_LANES,
    "LOWPRECISION": {
        2: ((512 * KIB, 16), (2 * MIB, 32), (None, 64)),
        4: ((512 * KIB, 16), (8 * MIB, 32), (None, 64)),
    },
}


def _tabulated(table: Mapping[int, object], world_size: int) -> int:
    """The next larger tabulated world size, or the largest."""
    return next((size for size in table if world_size <= size), max(table))


def _of(table: Mapping[int, _T], world_size: int) -> _T:
    return table[_tabulated(table, world_size)]


def host_in_band_bytes(strategy: str, world_size: int) -> int:
    """Largest message that a strategy sends in band through host memory."""
    return _of(HOST_IN_BAND_BYTES[strategy], world_size)


def flagged_lanes(strategy: str, facts: GroupFacts, payload_bytes: int) -> int:
    """Blocks that a kernel with flags may have, of those that the workspace has lanes for."""
    if facts.transport is not Transport.HOST:
        return facts.lanes
    steps = _of(HOST_LANES[strategy], facts.world_size)
    return min(facts.lanes, next(most for limit, most in steps if limit is None or payload_bytes <= limit))


def vectors_per_thread(transport: Transport) -> int | None:
    """Vectors of each thread in a chunk of a kernel with flags: short chunks keep PCIe busy both ways."""
    return 1 if transport is Transport.HOST else None


def table_of(facts: GroupFacts, element_bytes: int) -> Table:
    """The table for a group, measured or seed; its source says which."""
    if facts.tuned is not None:
        return facts.tuned.table(element_bytes)
    if facts.transport is Transport.HOST:
        table = _of(HOST, facts.world_size)
    else:
        in_band = facts.in_band.two_shot > 0
        table = fastest(facts.world_size, facts.architecture, in_band=in_band, topology_class=facts.topology_class)
    known = facts.topology_class is not TopologyClass.UNKNOWN
    over = f" over {facts.topology_class.in_words}" if known else ""
    return Table(table.ranges, f"the seed table for {facts.world_size} ranks{over}: {table.source}")


def link_scale(architecture: int | None, topology_class: TopologyClass) -> float:
    """What the links carry, of an H200's NVLinks. Unknown GPUs count as an H200; without NVLink, all are alike."""
    if topology_class is TopologyClass.PCIE_PEER:
        return PCIE_SCALE
    return LINK_SCALE.get(architecture or 90, 1.0)


def fastest(
    world_size: int,
    architecture: int | None,
    *,
    in_band: bool,
    topology_class: TopologyClass = TopologyClass.UNKNOWN,
) -> Table:
    """The seed for any group: the next larger tabulated world size, or the largest; scaled to the GPU's links."""
    if not in_band:
        return _of(FLAGGED_B200 if architecture in _B200 else FLAGGED, world_size)
    table = _of(H200, world_size)
    scale = link_scale(architecture, topology_class)
    if scale == 1.0:
        return table
    ranges = tuple(
        dataclasses.replace(found, max_bytes=found.max_bytes and int(found.max_bytes * scale)) for found in table.ranges
    )
    on = f"sm_{architecture}" if scale != PCIE_SCALE else "PCIe"
    return Table(ranges, f"scaled by {scale} from H200 for {on}: an estimate")


# Two blocks to a multiprocessor of an H200: what the numbers of a Split are parts of.
LARGEST_GRID = 264


@dataclasses.dataclass(frozen=True)
class Split:
    """From ``min_bytes`` on, lanes have one task each: so many of LARGEST_GRID, scaled to the grid at hand."""

    min_bytes: int
    lanes: int
    scatter: int
    drain: int


# In band, measured on H200 with 2 and 4 ranks, the latter also for more. Those of exact kernels only where the largest
# grid has not a thread for each vector; one block to a multiprocessor, because those that poll then leave the caches to
# the others. LOWPRECISION (FP8) always; encoding and decoding take time of their own, so that more blocks pay where the
# links are not busy all the time.
SPLITS: dict[str, dict[int, tuple[Split, ...]]] = {
    "ONESHOT": {2: (Split(0, 132, 16, 0),), 3: ()},
    "TWOSHOT": {2: (), 3: (Split(0, 132, 48, 40), Split(64 * MIB, 132, 48, 33))},
    "LOWPRECISION": {
        2: (Split(0, 132, 43, 43), Split(2 * MIB, 264, 66, 66), Split(40 * MIB, 132, 26, 33)),
        4: (Split(0, 132, 33, 43), Split(2 * MIB, 264, 87, 87), Split(40 * MIB, 132, 26, 43)),
    },
}


def split(strategy: str, world_size: int, payload_bytes: int) -> Split | None:
    """How the lanes of a large message share the tasks out; None: they do not."""
    splits = _of(SPLITS[strategy], world_size)
    return next((split for split in reversed(splits) if payload_bytes >= split.min_bytes), None)


# Staged calls (csrc/device/staged_lane.cuh). An estimate, not measured: a stage waits for two flags more than stores
# that nobody orders, about 5 us over PCIe. Half the rate of a link of 25 GB/s (PCIe 4.0 x16) costs as much for 128 KiB:
# if stores of all to all at once lose half, stages are faster for more than that to each peer.
STAGED_ABOVE_STAGE_BYTES = 128 * KIB
# Blocks: 32 of 224 threads have 448 KiB in flight, several times what PCIe carries in the 2 us of a store.
STAGED_LANES = 32

# The smallest message per rank for which a wire format is faster than the best exact kernel, by world size (the next
# larger one, or the last), and where that comes from. Scaled, for GPUs' own memory, to what their links carry: what
# compression costs does not depend on them, what it saves is inverse to them.
LOW_PRECISION_PAYS_FROM: dict[tuple[Transport, str], tuple[dict[int, int], str]] = {
    (Transport.SYMMETRIC, "fp8"): ({2: 2304 * KIB, 4: 2 * MIB}, _MEASURED),
    (Transport.SYMMETRIC, "tq3"): ({4: 4 * MIB}, _MEASURED),
    (Transport.SYMMETRIC, "hadamard2"): ({4: 26 * MIB}, _MEASURED),
    (Transport.HOST, "fp8"): ({4: 96 * KIB}, _MEASURED),
    (Transport.HOST, "tq3"): ({2: 256 * KIB, 4: 384 * KIB}, _MEASURED),
    (Transport.HOST, "hadamard2"): ({4: 640 * KIB}, _MEASURED),
}


def low_precision_pays_from(facts: GroupFacts, wire_format: str) -> tuple[int, str]:
    """The smallest message per rank for which compression is faster, and how that is known."""
    if (facts.transport, wire_format) not in LOW_PRECISION_PAYS_FROM:
        return 0, "CPU ranks compress everything"
    sizes, source = LOW_PRECISION_PAYS_FROM[facts.transport, wire_format]
    tabulated = _tabulated(sizes, facts.world_size)
    if facts.world_size != tabulated:
        source += f" with {tabulated} ranks"
    symmetric = facts.transport is Transport.SYMMETRIC
    scale = link_scale(facts.architecture, facts.topology_class) if symmetric else 1.0
    if scale != 1.0:
        source += f", scaled by {scale} for sm_{facts.architecture}"
    return int(sizes[tabulated] * scale), source
