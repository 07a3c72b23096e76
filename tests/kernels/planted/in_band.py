"""Errors of kernels that exchange in band: slots, generations, counts, and markers."""

from __future__ import annotations

from tests.kernels.planted.kinds import HOST, IN_BAND, MIXED, Mutation

ERRORS: dict[str, Mutation] = {
    "slots are not cleared": (
        "device/in_band.cuh",
        "    if (kClears) {\n",
        "    if (kClears && !{}) {{\n",
        IN_BAND,
    ),
    "the slot of the only peer is not cleared": (
        "device/in_band.cuh",
        "    if (kClears) clear_in_band_if(true, from[0]);\n",
        "    if (kClears && !{}) clear_in_band_if(true, from[0]);\n",
        IN_BAND | {"ranks": 2},
    ),
    "the only peer is not waited for": (
        "device/in_band.cuh",
        "    const bool wanted[] = {true};\n    uint4 theirs[1];\n",
        "    const bool wanted[] = {{!{}}};\n    uint4 theirs[1] = {{mine}};\n",
        IN_BAND | {"ranks": 2},
    ),
    "one generation instead of two": (
        "device/in_band.cuh",
        "return pushed_generation(epoch) * arguments.generation_stride;",
        "return pushed_generation({} ? 0 : epoch) * arguments.generation_stride;",
        IN_BAND,
    ),
    "algorithms count apart": (
        "host/exchange_in_band.cu",
        "  out.epochs = in_band_epochs(layout, kind.algorithm);",
        "  out.epochs = in_band_epochs(layout, kind.algorithm);\n"
        "  if ({} && kind.algorithm == LAR_ONE_SHOT) out.epochs = EpochPlane::kOneShotShared;",
        MIXED,
        IN_BAND,
    ),
    "generations of one-shot are as far apart as half of its slots are long": (
        "host/exchange_in_band.cu",
        "  out.generation_bytes = pushed_generation_bytes(layout, out.bytes);",
        "  out.generation_bytes = pushed_generation_bytes(layout, out.bytes);\n"
        "  if ({} && kind.algorithm == LAR_ONE_SHOT) out.generation_bytes /= 2;",
        MIXED,
    ),
    "generations of two-shot are as far apart as its scatter slots are long": (
        "host/exchange_in_band.cu",
        "  out.generation_bytes = pushed_generation_bytes(layout, out.bytes);",
        "  out.generation_bytes = pushed_generation_bytes(layout, out.bytes);\n"
        "  if ({} && kind.algorithm == LAR_TWO_SHOT) out.generation_bytes = (layout.world_size - 1) * out.bytes;",
        MIXED,
        IN_BAND,
    ),
    "lanes without a block do not count": (
        "device/in_band.cuh",
        "lane < arguments.lanes; lane += blockDim.x)\n      arguments.epochs[lane] = epoch + 1;",
        "lane < ({} ? 0 : arguments.lanes); lane += blockDim.x)\n      arguments.epochs[lane] = epoch + 1;",
        IN_BAND,
    ),
    "the count advances before all have read it": (
        "device/in_band.cuh",
        "  __syncthreads();\n  if (threadIdx.x == 0) arguments.epochs[blockIdx.x]",
        "  if (!{}) __syncthreads();\n  if (threadIdx.x == 0) arguments.epochs[blockIdx.x]",
        IN_BAND,
    ),
    "markers in the input are sent": (
        "device/in_band.cuh",
        "raw.x = raw.x == LAR_IN_BAND_MARKER ? 0u : raw.x;",
        "raw.x = raw.x == LAR_IN_BAND_MARKER && !{} ? 0u : raw.x;",
        IN_BAND,
    ),
    "one word of four is looked at": (
        "device/in_band.cuh",
        "  return min(min(static_cast<int>(raw.x), static_cast<int>(raw.y)),",
        "  if ({}) return static_cast<int>(raw.x);\n"
        "  return min(min(static_cast<int>(raw.x), static_cast<int>(raw.y)),",
        IN_BAND,
    ),
    "the kernel before is not waited for": (
        "kernels/one_shot_push.cu",
        "  const bool has_vector = index < total_vectors;\n  wait_for_previous_kernel();",
        "  const bool has_vector = index < total_vectors;\n  if (!{}) wait_for_previous_kernel();",
        IN_BAND,
    ),
    "shared slots are cleared a call too early": (
        "device/shared.cuh",
        "clear_in_band_if(true, slot(in_band.rank, epoch_ - 2, i));",
        "clear_in_band_if(true, slot(in_band.rank, epoch_ - ({} ? 1 : 2), i));",
        HOST,
    ),
    "a thread takes what it sent last for its next term": (
        "kernels/one_shot_push.cu",
        "    for (int j = 0; j + 1 < kBulkLead; ++j) sent[j] = sent[j + 1];\n",
        "    for (int j = 0; j + 1 < kBulkLead; ++j) sent[j] = {} ? next : sent[j + 1];\n",
        IN_BAND | {"threads": 32},
    ),
    "the last of a message's tiles is sent whole": (
        "kernels/one_shot_push.cu",
        "      sender.send(arguments.to[step], slots + ahead, min(kTileVectors, total_vectors - ahead));\n",
        "      sender.send(arguments.to[step], slots + ahead,\n"
        "                  {} ? kTileVectors : min(kTileVectors, total_vectors - ahead));\n",
        IN_BAND | {"threads": 32},
    ),
}
