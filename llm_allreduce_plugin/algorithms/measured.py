"""What was measured, and what is estimated from it: numbers alone, each with its source. ``tables`` reads them.

One-shot sends (N-1) * S per link direction, two-shot 2 (N-1)/N * S at the price of a second step (about 1 us on
NVLink). With two ranks both send S, so one-shot wins again where the second step no longer hides in the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llm_allreduce_plugin.algorithms.ranges import Range, Table, between, changeover
from llm_allreduce_plugin.topology.links import Transport

KIB = 1024
MIB = 1024 * KIB

_MEASURED = "measured on H200"
_MEASURED_H100 = "measured on H100"
_MEASURED_FLAGGED = "measured on H200 with kernels that wait for flags"
_BETWEEN = "an estimate between 2 and 4 ranks"
_BEYOND = "an estimate beyond 4 ranks"
_ESTIMATE = "an estimate: a step of about 1 us against the traffic that one-shot sends more at 350 GB/s"

# In band, on one NVSwitch node of H200. 2, 3 and 4 ranks are measured (configs/tuning/nvidia-h200.json,
# nvidia-h200-x4.json): between two sizes that were measured, where the lines of both cross. The others are estimates,
# scaled to meet that of 4.
H200 = {
    2: Table(
        # Both send as much. In one step the largest grid has a thread for each vector to 2 MiB, in two to 4: the
        # window comes of grids and memory, not of links. Of 2 H100 it is 2.6 to 4.1 MiB
        # (configs/tuning/nvidia-h100-x4.json).
        (Range(3328 * KIB, "ONESHOT"), Range(8960 * KIB, "TWOSHOT"), Range(None, "ONESHOT")),
        "measured on 2 H200",
    ),
    3: changeover(560 * KIB, "measured on 3 H200"),
    4: changeover(216 * KIB, "measured on 4 H200"),
    5: changeover(126 * KIB, _ESTIMATE),
    6: changeover(90 * KIB, _ESTIMATE),
    7: changeover(72 * KIB, _ESTIMATE),
    8: changeover(58 * KIB, _ESTIMATE),
    16: changeover(22 * KIB, _ESTIMATE),
    32: changeover(10 * KIB, _ESTIMATE),
    72: changeover(4 * KIB, _ESTIMATE),
}
# Of two GPUs whose links are not an H200's: nobody measured where two steps hide what they cost, if anywhere.
TWO_RANKS_ELSEWHERE = Table((Range(None, "ONESHOT"),), "with 2 ranks one step sends no more than two: an estimate")
# Of H100 and H200, on which numbers that are called measured were: of other GPUs they are estimates.
MEASURED_ARCHITECTURE = 90

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
    2: changeover(2 * MIB, _MEASURED_FLAGGED),
    3: changeover(1 * MIB, _BETWEEN),
    4: changeover(512 * KIB, _MEASURED_FLAGGED),
    5: changeover(320 * KIB, _BEYOND),
    6: changeover(224 * KIB, _BEYOND),
    7: changeover(160 * KIB, _BEYOND),
    8: changeover(128 * KIB, _BEYOND),
    16: changeover(32 * KIB, _BEYOND),
}

# Kernels that wait for flags on B200 and B300: FlashInfer's limits (its pull request 1972, measured on B200): one-shot
# while tokens * hidden * 2 * tp * itemsize, which is 2 * tp messages, is at most so many MiB. Its one-shot polls the
# data as ours in band does; its two-shot waits at two barriers as our kernels with flags do, which is what these limits
# weigh. In band two-shot has no barrier and pays from far smaller messages (on H200 with 4 ranks from 216 KiB on, where
# FlashInfer's limit says 8 MiB and its own two-shot is nearly twice as fast at 2 MiB), so that H200's table, scaled to
# the links, is nearer. The limits are upper bounds: our one-shot with flags is slower than the one that was measured.
FLASHINFER_B200_MIB = {2: 512, 4: 64, 8: 42}
_FLASHINFER_BYTES = {size: limit * MIB // (2 * size) for size, limit in FLASHINFER_B200_MIB.items()}
_FLASHINFER = "FlashInfer's limits for B200, where two-shot waits at barriers"
FLAGGED_B200 = {
    size: changeover(
        between(_FLASHINFER_BYTES, size),
        _FLASHINFER if size in _FLASHINFER_BYTES else f"an estimate from {_FLASHINFER}",
    )
    for size in FLAGGED
}
B200 = (100, 103)

# Through pinned host memory.
HOST = {
    2: Table((Range(None, "ONESHOT"),), "measured on H200 through host memory"),
    3: changeover(128 * KIB, _BETWEEN),
    4: changeover(64 * KIB, "measured on H200 through host memory"),
    5: changeover(48 * KIB, _BEYOND),
    6: changeover(32 * KIB, _BEYOND),
    7: changeover(32 * KIB, _BEYOND),
    8: changeover(24 * KIB, _BEYOND),
    16: changeover(8 * KIB, _BEYOND),
}

# Through host memory: the largest message whose readiness travels inside the data. Two ranks of ONESHOT: 25.7 us at
# 512 KiB (benchmarks/h200/host_in_band_tp2.json), on another node 27.1 by flags (host_shapes_pairs_tp2.json).
HOST_IN_BAND_BYTES = {
    "ONESHOT": {2: 512 * KIB, 4: 256 * KIB, 16: 64 * KIB},
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

# Two blocks to a multiprocessor of an H200: what the numbers of a Split are parts of.
LARGEST_GRID = 264


@dataclasses.dataclass(frozen=True)
class Split:
    """From ``min_bytes`` on, lanes have one task each: so many of LARGEST_GRID."""

    min_bytes: int
    lanes: int
    scatter: int
    drain: int

    def on(self, lanes: int) -> Split:
        """The same of a grid of so many lanes."""
        used, scatter, drain = (lanes * number // LARGEST_GRID for number in (self.lanes, self.scatter, self.drain))
        return Split(self.min_bytes, used, max(1, scatter), drain)


# In band, measured on H200 and H100 with 2 and 4 ranks, the latter also for more. Those of exact kernels only where the
# largest grid has not a thread for each vector; one block to a multiprocessor, because those that poll then leave the
# caches to the others. Two steps of LOWPRECISION (FP8): below, warps that do everything were faster, by 0.2 us at 1 MiB
# and 0.4 at 4 with 4 ranks, each at its best shape; at 64 MiB they were slower by 8 us with 2 ranks, and with 4 in
# blocks of 512 threads by 6 (132 blocks of 384 were 1 % faster than any split there; that is not used:
# benchmarks/h100/low_precision_shapes_tp2.json, low_precision_shapes_tp4.json).
SPLITS: dict[str, dict[int, tuple[Split, ...]]] = {
    "ONESHOT": {2: (Split(0, 132, 16, 0),), 3: ()},
    "TWOSHOT": {2: (), 3: (Split(0, 132, 48, 40), Split(64 * MIB, 132, 48, 33))},
    # Nobody takes results in (benchmarks/h100/shapes_ub_tp2.json, shapes_ub_tp4.json).
    "UB": {
        2: (Split(0, 132, 48, 0), Split(8 * MIB, 132, 64, 0)),
        3: (Split(0, 132, 56, 0), Split(40 * MIB, 132, 64, 0)),
    },
    "LOWPRECISION": {2: (Split(40 * MIB, 132, 26, 33),), 4: (Split(40 * MIB, 132, 26, 43),)},
}


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Blocks that share a row, a cluster of them.

    Attributes:
        blocks: of a row.
        least_vectors: of a row that each has, where it is worth it.
        most_lanes: of all rows together, of a grid of LARGEST_GRID; with more, clusters take rows in turns.
        most_lanes_of_short: the same where one block would hold a row at a vector to a thread.
        most_lanes_of_wide: the same where a wide block would.
    """

    blocks: int
    least_vectors: int
    most_lanes: int
    most_lanes_of_short: int = 0
    most_lanes_of_wide: int = 0


@dataclasses.dataclass(frozen=True)
class RowShape:
    """How a kernel deals the vectors of a row out, where the norm follows the all-reduce.

    A block takes a row, or a cluster of blocks does. A thread has so many vectors of it as it takes for at most
    ``most_threads``.

    Attributes:
        most_threads: of a block.
        vectors: of a row that a thread may have, fewest first.
        sharing: clusters that are worth it, the first that fits; empty: there are none.
        split_bytes: the smallest message whose lanes have one task each. None: none has.
        wide_threads: of a block that holds a row of one-shot's over two ranks at a vector to a thread; 0: no such.
        pushes: of one-shot over two ranks, some lanes do nothing but push: PUSHING_WARPS together.
        paired_threads: of the largest block of which a multiprocessor holds two.
    """

    most_threads: int
    vectors: tuple[int, ...]
    sharing: tuple[Sharing, ...] = ()
    split_bytes: int | None = None
    wide_threads: int = 0
    pushes: bool = False
    paired_threads: int = 0


# Results that are stored into registered outputs. The smallest message, by world size (the next larger one, or the
# last), where that was asked for: an estimate, below which two more flights of a flag cost more than a copy. None: at
# no size; over two GPUs one step was faster than that everywhere (benchmarks/h100/shapes_ub_tp2.json,
# bench_ub_tp2.json). With four, TWOSHOT by slots was (shapes_ub_tp4.json): whoever asks for UB by name gets it, and
# nobody else.
PLACE_PAYS_FROM: dict[int, int | None] = {2: None, 72: 4 * MIB}
PLACE_SOURCE = "an estimate"
ONE_STEP_INSTEAD = (
    "over two GPUs one step stores sums straight into the output, and no byte waits for another "
    "(2 H100, 16 MiB: 49.2 us against 53.5)"
)
# The same where AUTO and MINLATENCY may choose it, of the world sizes for which it was measured to be faster: none yet.
TABLE_PLACES_FROM: dict[int, int] = {}

# All-reduce, residual and norm in one kernel, by exchange (algorithms/fused.py). Measured on 2 H100 with one-shot
# (benchmarks/h100/fused_shapes_tp2.json, wide blocks: fused_shapes_wide_tp2.json), from 2 MiB on with 2 H200
# (benchmarks/h200/fused_shapes_narrow_tp2.json); for more ranks, and through host
# memory, an estimate from it. What a launch does to the kernel behind it counts, too: with 32 rows of 8192, clusters of
# two blocks are 0.4 us faster than wide blocks by themselves, and a matrix product over all multiprocessors took 7 us
# longer behind 32 of them (fused_shapes_behind_tp2.json; see Leaves).
ROW_SHAPES = {
    "PUSH": RowShape(
        512,
        (1, 2),
        (Sharing(8, 128, 32, 0, 32), Sharing(4, 128, 256, 64, 64), Sharing(2, 256, 264)),
        split_bytes=8 * MIB,
        wide_threads=1024,
        pushes=True,
        paired_threads=256,
    ),
    # Own rows of a rank (benchmarks/h100/fused_shapes_tp4.json).
    "PUSH_TWO_SHOT": RowShape(
        512,
        (1, 2),
        (Sharing(8, 128, 128), Sharing(4, 128, 128, 128), Sharing(2, 128, 528, 264)),
        split_bytes=2 * MIB,
    ),
    "SHARED": RowShape(256, (1, 2, 4)),
}
MOST_SHARING = 8  # blocks of a cluster


@dataclasses.dataclass(frozen=True)
class Leaves:
    """Grids that leave a GPU as they found it, for the clusters of the kernel after them.

    A GPU deals clusters out over its GPCs in turns. Where the next kernel's turn begins may depend on how many clusters
    the kernel before it had. A matrix product of 112 clusters takes an H100 161 to 171 us by that alone
    (benchmarks/h100/product_behind.json).

    Attributes:
        multiprocessors: of the GPUs on which that was measured; of others nothing is known.
        clusters: by blocks of a cluster, the numbers of clusters behind which the turn begins where it would have begun
            without them, or at the first GPC (benchmarks/h100/clusters_leave.json). 1: of kernels without clusters.
    """

    multiprocessors: int
    clusters: dict[int, tuple[int, ...]]

    def padded(self, clusters: int, blocks: int, most: int) -> int:
        """The least such number, from ``clusters`` of so many ``blocks`` to ``most``; if there is none, itself."""
        found = (number for number in self.clusters.get(blocks, ()) if clusters <= number <= most)
        return next(found, clusters)


LEAVES = Leaves(
    132,
    {
        1: (*range(1, 9), *range(15, 141), *range(147, 265)),
        2: (
            *(1, 2, 3, 4, 11, 12, 19, 20, 27, 28, 35, 36, 43, 50, 57, 64, 66, 67, 68, 69, 70, 78, 86, 94, 102, 109),
            *(116, 123, 130, 132),
        ),
        4: (7, 8, 15, 16, 23, 30, 38, 46, 53, 60, 62),
        8: (7, 8, 15, 23, 30),
    },
)
# Warps that only push, of a grid of LARGEST_GRID, by what GPUs are called, whatever a row is wide; of others the last.
# With fewer the links wait for them; with more everything is slower at once, as if other accesses stood behind what
# waits for the links. 6560 rows of 2880 / 4096 / 5120 / 8192 take two H200 113 / 155 / 199 / 300 us with 448 and
# 135 / 191 / 212 / 352 with 512 (benchmarks/h200/fused_pushing_warps_tp2.json). Two H100, whose memory is slower, took
# 192 us for 4096 rows of 8192 with 512, and 216 with 384 (benchmarks/h100/fused_shapes_tp2.json).
PUSHING_WARPS = {"H100": 512, "H200": 448, "": 448}
MOST_PUSHING = 0.4  # of the lanes, whatever a block has: more was fastest for no size of rows (the same records)
# As SPLITS, of fused two-shot, with four ranks (benchmarks/h100/fused_shapes_own_row_too_tp4.json, whose lanes with one
# task each are those of the library).
FUSED_TWO_SHOT_SPLIT = Split(0, 132, 16, 76)
CLUSTERS_FROM = 90  # architectures that have clusters of blocks
# The smallest and the largest message for which one kernel is faster than two, by transport, the algorithm of the one
# and world size (the next larger one, or the last). No largest: none is known for which it is not. NEVER: for none. A
# profile comes before it. In graphs: times of eager calls are mostly the host's, and one choice must do for both
# (profiles/entry.py).
#
# Two steps (four H100, rows of 4096 and 8192): lanes of few rows wait for one message after the other, 10.6 us against
# 9.1 at 1 MiB; 15.4 against 17.1 at 2 (benchmarks/h100/fused_shapes_tp4.json). With four H200 both are as fast at 1.6
# MiB, with three at 4.6, and at 800 KiB before (configs/tuning/nvidia-h200-x4.json); with four H100 at 1.4
# (nvidia-h100-x4.json). Two ranks never take two steps.
# Through host memory 16-bit rows that travel in band were slower in one kernel at every size (the same file, and
# nvidia-h100.json).
NEVER = None
FUSED_PAYS: dict[tuple[Transport, str], dict[int, tuple[int, int | None] | None]] = {
    (Transport.SYMMETRIC, "ONE_SHOT"): {8: (0, None)},
    (Transport.SYMMETRIC, "TWO_SHOT"): {3: (4736 * KIB, None), 4: (1600 * KIB, None), 8: (2 * MIB, None)},
    (Transport.HOST, "ONE_SHOT"): {8: NEVER},
}
# Over more than two ranks, the largest message that one kernel takes in one step where the sum alone takes two. Four
# H200: 5.74 us for 256 KiB, sum and norm in two steps and two kernels 6.05; for 320 KiB 6.32 and 6.27
# (benchmarks/h200/fused_shapes_16_rows_tp4.json). Four H100: 5.91 and 6.18 for 256 KiB (h100/fused_shapes_tp4.json).
FUSED_ONE_STEP_BYTES = {3: 0, 4: 256 * KIB, 8: 0}
# Which groups that was measured for (benchmarks/h200/bench_fused_tp2.json, h100/two_versions_fused_tp2.json,
# h100/fused_shapes_tp4.json, and the profiles above); of others nobody knows.
FUSED_SOURCES: dict[tuple[Transport, int], str] = {
    (Transport.SYMMETRIC, 2): "one kernel was faster than two from 16 KiB to 64 MiB (2 H200, 2 H100, rows of 8192)",
    (Transport.SYMMETRIC, 3): (
        "one kernel was faster than two in one step to 512 KiB and in two from 4.625 MiB on (3 H200, rows of 8192)"
    ),
    (Transport.SYMMETRIC, 4): (
        "one kernel was faster than two in one step to 256 KiB and in two from 1.6 MiB on "
        "(4 H200, 4 H100, rows of 8192)"
    ),
    (Transport.HOST, 2): "5.51 us against 6.88 at 16 KiB, 17.4 against 18.6 at 256 KiB: 2 H100, rows of 8192",
    (Transport.HOST, 4): "6.13 us against 10.1 at 16 KiB, 10.6 against 12.9 at 64 KiB: 4 H200, rows of 8192",
}

# Staged calls (csrc/device/staged_lane.cuh). An estimate, not measured: a stage waits for two flags more than stores
# that nobody orders, about 5 us over PCIe. Half the rate of a link of 25 GB/s (PCIe 4.0 x16) costs as much for 128 KiB:
# if stores of all to all at once lose half, stages are faster for more than that to each peer.
STAGED_ABOVE_STAGE_BYTES = 128 * KIB
# Blocks: 32 of 224 threads have 448 KiB in flight, several times what PCIe carries in the 2 us of a store.
STAGED_LANES = 32

# Up to so many ranks LOWPRECISION sums FP8 in one step: with two ranks one step sends as many bytes as two do, and was
# 1.5 us faster at 64 KiB, 1.0 at 1 MiB and 2 at 64 MiB, each at its best shape (benchmarks/h100/
# low_precision_shapes_tp2.json); with more it sends more, all of which is decoded. An estimate for more.
ONE_STEP_RANKS = 2
# The same through host memory, the largest message: 10.7 us instead of 10.9 at 256 KiB, 27.7 instead of 30.4 at 1 MiB
# (benchmarks/h200/host_in_band_tp2.json).
ONE_STEP_HOST_BYTES = 1 * MIB

# The smallest message per rank for which a wire format is faster than the best exact kernel, and where that comes from,
# by world size (the next larger one, or the last). Scaled, for GPUs' own memory, to what their links carry: what
# compression costs does not depend on them, what it saves is inverse to them.
LOW_PRECISION_PAYS_FROM: dict[tuple[Transport, str], dict[int, tuple[int, str]]] = {
    (Transport.SYMMETRIC, "fp8"): {2: (448 * KIB, _MEASURED_H100), 4: (1152 * KIB, _MEASURED_H100)},
    (Transport.SYMMETRIC, "tq3"): {2: (5760 * KIB, _MEASURED_H100), 4: (3840 * KIB, _MEASURED_H100)},
    (Transport.SYMMETRIC, "hadamard2"): {2: (6400 * KIB, _MEASURED_H100), 4: (3968 * KIB, _MEASURED_H100)},
    (Transport.HOST, "fp8"): {2: (64 * KIB, _MEASURED_H100), 4: (96 * KIB, _MEASURED)},
    (Transport.HOST, "tq3"): {2: (256 * KIB, _MEASURED), 4: (384 * KIB, _MEASURED)},
    (Transport.HOST, "hadamard2"): {4: (640 * KIB, _MEASURED)},
}

# Bytes of 16-bit values that a codec encodes and decodes in a second, alone on an H100: benchmarks/h100/breakeven.json.
CODEC_BYTES_PER_S = {"fp8": (1523e9, 1207e9), "tq3": (1611e9, 1811e9), "hadamard2": (1330e9, 1813e9)}

# Between hosts, modelled and not measured: what a GPU's share of the network carries, and pieces in which summing and
# sending go on at the same time. What a step costs: host_costs.
NETWORK_BYTES_PER_S = 46e9
NETWORK_PIECE_BYTES = 16 << 20
NETWORK_MOST_PIECES = 4
NETWORK_SOURCE = "46 GB/s to each GPU"
