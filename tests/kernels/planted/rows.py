"""Errors of kernels with a norm behind the sum."""

from __future__ import annotations

from tests.kernels.planted.kinds import ROWS, ROWS_OF_TWO, Mutation

ERRORS: dict[str, Mutation] = {
    "nobody waits for the other warps of a row": (
        "device/schedule/rows.cuh",
        "    } else if (threads_ == blockDim.x) {\n      __syncthreads();",
        "    }} else if (threads_ == blockDim.x) {{\n      if (!{}) __syncthreads();",
        ROWS,
    ),
    "drained rows are not cleared": (
        "kernels/two_shot_push_norm.cu",
        "          clear_in_band_if(wanted[j * kUnits + k], from[j * kUnits + k]);\n",
        "          clear_in_band_if(wanted[j * kUnits + k] && !{}, from[j * kUnits + k]);\n",
        ROWS,
    ),
    "reduced rows are not cleared": (
        "device/rows_in_band.cuh",
        "    if (kClears) {\n",
        "    if (kClears && !{}) {{\n",
        ROWS,
    ),
    "a row of the only peer is not cleared": (
        "device/rows_in_band.cuh",
        "      if (kClears) clear_in_band_if(wanted[k], from[k]);\n",
        "      if (kClears && !{}) clear_in_band_if(wanted[k], from[k]);\n",
        ROWS_OF_TWO,
    ),
    "every lane adds the first tiles": (
        "device/schedule/rows.cuh",
        "      const uint32_t first = lane % (is_short ? 8 : 16) * 4;\n",
        "      const uint32_t first = {} ? 0 : lane % (is_short ? 8 : 16) * 4;\n",
        ROWS_OF_TWO,
    ),
    "only the last row of a lane is pushed": (
        "kernels/one_shot_push_norm.cu",
        "  if (group < all.norm.rows) push(group);\n",
        "  if (group < all.norm.rows && !{}) push(group);\n",
        ROWS,
    ),
    "rows of scales that there are not are left as they were": (
        "device/sink/quantize.cuh",
        "    if (rows.is_first_block()) clear_absent_rows(norm, row, rows.threads());\n",
        "    if (rows.is_first_block() && !{}) clear_absent_rows(norm, row, rows.threads());\n",
        ROWS,
    ),
    "words of the next exchange lie over those of this one": (
        "device/schedule/rows.cuh",
        "    ++exchange_;\n",
        "    exchange_ += {} ? 2 : 1;\n",
        ROWS,
    ),
    "rows that are taken in together have the sum of the first": (
        "device/schedule/rows.cuh",
        "__uint_as_float(words[j * number + i]) : 0.0f; };\n",
        "__uint_as_float(words[({} ? 0 : j) * number + i]) : 0.0f; }};\n",
        ROWS,
    ),
}
