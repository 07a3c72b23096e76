"""Errors of kernels that exchange in band: slots, generations, counts, and markers."""

from __future__ import annotations

from tests.kernels.planted.kinds import (
    HOST,
    HOST_ROWS,
    IN_BAND,
    LARGE_HOST,
    LARGE_HOST_IN_TWO_STEPS,
    LARGE_HOST_IN_TWO_STEPS_OF_FIVE,
    LARGE_HOST_IN_TWO_STEPS_OF_THREE,
    LARGE_HOST_OF_THREE,
    MIXED,
    Mutation,
)

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
        "slot(arguments_.in_band.rank, epoch_ - 2, index));",
        "slot(arguments_.in_band.rank, epoch_ - ({} ? 1 : 2), index));",
        HOST,
    ),
    "the peer's first poll is taken as it is": (
        "device/in_band.cuh",
        "if (!(asked && are_complete(theirs)) &&",
        "if (!(asked && ({} || are_complete(theirs))) &&",
        LARGE_HOST,
    ),
    "the first poll of several ranks is taken as it is": (
        "device/in_band.cuh",
        "if (!(asked && first == 0 && are_complete(parts)) &&",
        "if (!(asked && first == 0 && ({} || are_complete(parts))) &&",
        LARGE_HOST_OF_THREE,
    ),
    "what was asked for is another rank's": (
        "device/in_band.cuh",
        "parts[i] = asked && first == 0 && wanted[i] ? asked->of(i) : mine;",
        "parts[i] = asked && first == 0 && wanted[i] ? asked->of({} ? 0 : i) : mine;",
        LARGE_HOST_OF_THREE,
    ),
    "large calls through host memory clear nothing on the way": (
        "device/shared.cuh",
        "if (index < old_vectors_) clear_all<kWorldSize>(scatters, index);",
        "if (index < old_vectors_ && !{}) clear_all<kWorldSize>(scatters, index);",
        LARGE_HOST,
        LARGE_HOST_IN_TWO_STEPS,
    ),
    "a large call does not clear what the old one had more": (
        "device/shared.cuh",
        "if (is_last) clear_old_generation<kWorldSize>(scatters, index + workers());",
        "if (is_last) {} ? leave_clears() : clear_old_generation<kWorldSize>(scatters, index + workers());",
        LARGE_HOST,
        LARGE_HOST_IN_TWO_STEPS,
    ),
    "workers without a vector of a large call clear nothing": (
        "kernels/one_shot_shared.cu",
        "  if (!is_large || first_tile >= total_vectors) call.clear_old_generation<kWorldSize>(false);\n",
        "  if (!is_large || first_tile >= total_vectors)\n"
        "    is_large && {} ? call.leave_clears() : call.clear_old_generation<kWorldSize>(false);\n",
        LARGE_HOST,
    ),
    "the last stride of a large call is not seen where it is whole": (
        "kernels/one_shot_shared.cu",
        "const bool is_last = total_vectors - tile <= stride;",
        "const bool is_last = total_vectors - tile + ({} ? 1 : 0) <= stride;",
        LARGE_HOST,
    ),
    "the last stride of a large call in two steps is not seen where it is whole": (
        "kernels/two_shot_shared.cu",
        "const bool is_last = part - tile <= stride;",
        "const bool is_last = part - tile + ({} ? 1 : 0) <= stride;",
        LARGE_HOST_IN_TWO_STEPS,
    ),
    "lanes without a block do not note how much there is": (
        "device/shared.cuh",
        "lane < lanes; lane += blockDim.x) lengths[lane] = vectors;",
        "lane < ({} ? 0 : lanes); lane += blockDim.x) lengths[lane] = vectors;",
        HOST_ROWS,
    ),
    "the releaser does not wait for the workers": (
        "device/shared.cuh",
        "    barrier<true>();\n",
        "    {} ? barrier<false>() : barrier<true>();\n",
        HOST,
        LARGE_HOST_IN_TWO_STEPS,
    ),
    "the releaser does not wait for the clears": (
        "device/shared.cuh",
        "    __threadfence_system();\n",
        "    if (!{}) __threadfence_system();\n",
        HOST,
        LARGE_HOST_IN_TWO_STEPS,
    ),
    "results of all groups of peers are asked for first": (
        "kernels/two_shot_shared.cu",
        "const bool asks = is_large && first == 1;",
        "const bool asks = is_large && (first == 1 || {});",
        LARGE_HOST_IN_TWO_STEPS_OF_FIVE,
    ),
    "the first poll of results is taken as it is": (
        "kernels/two_shot_shared.cu",
        "if (!(asks && are_complete(results)) &&",
        "if (!(asks && ({} || are_complete(results))) &&",
        LARGE_HOST_IN_TWO_STEPS,
        LARGE_HOST_IN_TWO_STEPS_OF_THREE,
        LARGE_HOST_IN_TWO_STEPS_OF_FIVE,
    ),
    "large calls in two steps clear no scatter slots on the way": (
        "kernels/two_shot_shared.cu",
        "call.clear_on_the_way<kWorldSize>(true, i, is_last);",
        "call.clear_on_the_way<kWorldSize>(!{}, i, is_last);",
        LARGE_HOST_IN_TWO_STEPS,
    ),
    "workers without a vector of a large call in two steps clear nothing": (
        "kernels/two_shot_shared.cu",
        "  if (!is_large || first_tile >= part) call.clear_old_generation<kWorldSize>(true);\n",
        "  if (!is_large || first_tile >= part)\n"
        "    is_large && {} ? call.leave_clears() : call.clear_old_generation<kWorldSize>(true);\n",
        LARGE_HOST_IN_TWO_STEPS,
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
