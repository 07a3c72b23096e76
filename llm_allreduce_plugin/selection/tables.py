"""Seed thresholds: where AUTO leaves ONESHOT for TWOSHOT before anything was measured on the node."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

# Largest message, in bytes per rank, for ONESHOT. One-shot sends (N-1) * S per link direction and two-shot
# 2 (N-1)/N * S, at the price of a second step: the crossover falls with the world size.
# 2 and 4 ranks: measured on H200 (benchmarks/h200/latency_tp{2,4}.json and latency_in_band_tp{2,4}.json): the last
# power of two at which ONESHOT is faster. The others are estimates on the curve through those two, not measured.
ONE_SHOT_MAX_BYTES = {
    2: 2 * MIB,
    3: 1 * MIB,
    4: 512 * KIB,
    5: 320 * KIB,
    6: 224 * KIB,
    7: 160 * KIB,
    8: 128 * KIB,
    16: 32 * KIB,
}
ONE_SHOT_MAX_BYTES_IN_BAND = {
    2: 2 * MIB,
    3: 512 * KIB,
    4: 256 * KIB,
    5: 160 * KIB,
    6: 112 * KIB,
    7: 80 * KIB,
    8: 64 * KIB,
    16: 16 * KIB,
}


def one_shot_max_bytes(world_size: int, *, in_band: bool) -> int:
    """The threshold for any world size: the entry of the next larger tabulated one, or of the largest."""
    table = ONE_SHOT_MAX_BYTES_IN_BAND if in_band else ONE_SHOT_MAX_BYTES
    for tabulated, threshold in table.items():
        if world_size <= tabulated:
            return threshold
    return table[max(table)]
