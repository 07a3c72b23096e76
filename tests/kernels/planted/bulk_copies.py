"""Errors of tiles that leave by bulk copies, whichever kernels send them."""

from __future__ import annotations

from tests.kernels.planted.kinds import FP8, ONE_STEP, PLACES, SPLIT, Mutation

ERRORS: dict[str, Mutation] = {
    "a tile is filled before it has been read": (
        "device/bulk_sender.cuh",
        "    if (leads()) wait_for_bulk_reads<kTilesUnderWay - 1>();",
        "    if (leads() && !{}) wait_for_bulk_reads<kTilesUnderWay - 1>();",
        SPLIT,
        PLACES,
    ),
    "no fence is between a tile's stores and its copies": (
        "device/bulk_sender.cuh",
        "    fence_before_bulk_copies();",
        "    if (!{}) fence_before_bulk_copies();",
        SPLIT,
        FP8,
        ONE_STEP,
        PLACES,
    ),
    "a block ends before its tiles have been read": (
        "device/bulk_sender.cuh",
        "    if (leads()) wait_for_bulk_reads<0>();",
        "    if (leads() && !{}) wait_for_bulk_reads<0>();",
        SPLIT,
        FP8,
        ONE_STEP,
        PLACES,
    ),
    "results are told once their copies have been read": (
        "device/bulk_sender.cuh",
        "      wait_for_bulk_writes<kPending>();",
        "      {} ? wait_for_bulk_reads<kPending>() : wait_for_bulk_writes<kPending>();",
        PLACES,
    ),
    "no fence is between copied results and their flag": (
        "device/bulk_sender.cuh",
        "      fence_behind_bulk_copies();",
        "      if (!{}) fence_behind_bulk_copies();",
        PLACES,
    ),
}
