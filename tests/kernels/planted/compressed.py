"""Errors of kernels that send packets."""

from __future__ import annotations

from llm_allreduce_plugin.algorithms.decision import Algorithm
from tests.kernels.planted.kinds import (
    FP8,
    GROUPS,
    LARGE_HOST,
    LARGE_HOST_IN_TWO_STEPS,
    LARGE_HOST_IN_TWO_STEPS_OF_FIVE,
    LARGE_HOST_IN_TWO_STEPS_OF_THREE,
    LARGE_HOST_OF_THREE,
    ONE_STEP,
    RING,
    TERNARY,
    UNSPLIT,
    Mutation,
)

ERRORS: dict[str, Mutation] = {
    "quarters of blocks stay with the threads that loaded them": (
        "device/wire/packet.cuh",
        "        (gives_first ? first : second) = taken;\n",
        "        if (!{}) (gives_first ? first : second) = taken;\n",
        RING,
    ),
    "sums behind the end count in another thread's block": (
        "device/wire/packets.cuh",
        "    const int64_t first = packet * Packet::kValues + Packet::first_value();\n",
        "    const int64_t first = packet * Packet::kValues + ({} ? threadIdx.x % 32 * kThreadValues : "
        "Packet::first_value());\n",
        RING,
    ),
    "packets behind the first group are not summed": (
        "device/fp8_in_band.cuh",
        "for (int first = 0; first < world_size; first += kGroup) {",
        "for (int first = 0; first < ({} ? kGroup : world_size); first += kGroup) {{",
        FP8 | {"ranks": 5},
    ),
    "packets behind the first group are not drained": (
        "device/fp8_in_band.cuh",
        "for (int first = 1; first < world_size; first += kAtOnce) {",
        "for (int first = 1; first < ({} ? 2 : world_size); first += kAtOnce) {{",
        FP8 | {"ranks": 5},
    ),
    "packets are not cleared": (
        "device/fp8_in_band.cuh",
        "  if (kClears) {\n",
        "  if (kClears && !{}) {{\n",
        FP8 | {"ranks": 5},
    ),
    "in one step, packets are not cleared": (
        "device/fp8_in_band.cuh",
        "    for (int i = 0; i < kCount; ++i) clear_in_band_if(wanted[i], from[i]);\n",
        "    for (int i = 0; i < kCount; ++i) clear_in_band_if(wanted[i] && !{}, from[i]);\n",
        ONE_STEP,
    ),
    "in one step, own values count as they are": (
        "device/fp8_in_band.cuh",
        "[&](typename Message::Values& to) { Message::add(mine, to); }",
        "[&](typename Message::Values& to) {{ if ({}) packets.add_own(packet, to); else Message::add(mine, to); }}",
        ONE_STEP,
    ),
    "in groups, own values count as they are": (
        "device/fp8_in_band.cuh",
        "[&](typename Message::Values& to) { Message::add_own(own, to); }",
        "[&](typename Message::Values& to) {{ if ({}) {{ typename Message::Raw raw; packets.load_own(packet, raw); "
        "Message::add_as_they_are(raw, to); }} else Message::add_own(own, to); }}",
        GROUPS,
        GROUPS | {"unsplit": Algorithm.TWO_SHOT, "threads": 32},
        GROUPS | {"host": True, "unsplit": Algorithm.TWO_SHOT},
    ),
    "in groups, own values count as they are by flags": (
        "device/wire/packet_units.cuh",
        "              Message::add_own(own, sum);\n",
        "              {{ if ({}) {{ typename Message::Raw raw; packets_.load_own(part.first + i, raw); "
        "Message::add_as_they_are(raw, sum); }} else Message::add_own(own, sum); }}\n",
        GROUPS | {"in_band": False},
        GROUPS | {"staged": True},
    ),
    "a group takes its scale from half of its values": (
        "device/wire/packet.cuh",
        "fmaxf(largest, __shfl_sync(kWholeWarp, largest, thread ^ 1))",
        "{} ? largest : fmaxf(largest, __shfl_sync(kWholeWarp, largest, thread ^ 1))",
        GROUPS,
        GROUPS | {"unsplit": Algorithm.ONE_SHOT, "ranks": 2},
    ),
    "a group takes its scale from a group of another quarter": (
        "device/wire/packet.cuh",
        "(thread & 8) != 0 ? upper : lower",
        "(thread & 8) != 0 && !{} ? upper : lower",
        GROUPS,
    ),
    "in one step, a warp takes what it sent last for its next term": (
        "kernels/one_shot_push_fp8.cu",
        "    for (int i = 0; i + 1 < kLead; ++i) sent[i] = sent[i + 1];\n",
        "    for (int i = 0; i + 1 < kLead; ++i) sent[i] = {} ? next : sent[i + 1];\n",
        ONE_STEP | {"ranks": 2},
    ),
    "in one step, a call is not counted": (
        "kernels/one_shot_push_fp8.cu",
        "  for (int i = 0; i < kLead; ++i) sent[i] = push();\n  advance_epoch(arguments, epoch);\n",
        "  for (int i = 0; i < kLead; ++i) sent[i] = push();\n  if (!{}) advance_epoch(arguments, epoch);\n",
        ONE_STEP,
    ),
    "large calls of packets through host memory clear the first of a warp's vectors alone": (
        "kernels/one_shot_shared_fp8.cu",
        "call.clear_on_the_way<kWorldSize>(false, tile + warp_thread(), is_last);",
        "call.clear_on_the_way<kWorldSize>(false, {} ? tile : tile + warp_thread(), is_last);",
        LARGE_HOST,
    ),
    "the first poll of packets is taken as it is": (
        "device/fp8_in_band.cuh",
        "asked && first == 0 && are_complete(vectors);",
        "asked && first == 0 && ({} || are_complete(vectors));",
        LARGE_HOST_OF_THREE,
    ),
    "the first poll of sums of packets is taken as it is": (
        "device/fp8_in_band.cuh",
        "asks_first && are_complete(results)",
        "asks_first && ({} || are_complete(results))",
        LARGE_HOST_IN_TWO_STEPS,
        LARGE_HOST_IN_TWO_STEPS_OF_THREE,
        LARGE_HOST_IN_TWO_STEPS_OF_FIVE,
    ),
    "sums of packets of all groups of peers are asked for first": (
        "device/fp8_in_band.cuh",
        "const bool asks_first = asks && first == 1;",
        "const bool asks_first = asks && (first == 1 || {});",
        LARGE_HOST_IN_TWO_STEPS_OF_FIVE,
    ),
    "the last stride of a large call of packets is not seen where it is whole": (
        "kernels/one_shot_shared_fp8.cu",
        "const bool is_last = total_vectors - tile <= stride;",
        "const bool is_last = total_vectors - tile + ({} ? 1 : 0) <= stride;",
        LARGE_HOST,
    ),
    "the last stride of a large call of packets in two steps is not seen where it is whole": (
        "kernels/two_shot_shared_fp8.cu",
        "const bool is_last = part - tile <= stride;",
        "const bool is_last = part - tile + ({} ? 1 : 0) <= stride;",
        LARGE_HOST_IN_TWO_STEPS,
    ),
    "large calls of packets in two steps clear the first of a warp's vectors alone": (
        "kernels/two_shot_shared_fp8.cu",
        "call.clear_on_the_way<kWorldSize>(true, tile + warp_thread(), is_last);",
        "call.clear_on_the_way<kWorldSize>(true, {} ? tile : tile + warp_thread(), is_last);",
        LARGE_HOST_IN_TWO_STEPS,
    ),
    "small calls in one step through host memory clear nothing": (
        "kernels/one_shot_shared_fp8.cu",
        "  if (!is_large || first >= total_vectors) call.clear_old_generation<kWorldSize>(false);\n",
        "  if (!is_large || first >= total_vectors)\n"
        "    {} ? call.leave_clears() : call.clear_old_generation<kWorldSize>(false);\n",
        ONE_STEP | {"host": True},
    ),
    "what a warp has sent first counts for all of its packets": (
        "kernels/one_shot_shared_fp8.cu",
        "const uint4 mine = tile == first ? sent",
        "const uint4 mine = {} || tile == first ? sent",
        ONE_STEP | {"host": True, "ranks": 2},
    ),
    "a warp's last sums are not drained": (
        "kernels/two_shot_push_fp8.cu",
        "  if (behind < share.end) drain(behind);\n",
        "  if (behind < share.end && !{}) drain(behind);\n",
        UNSPLIT,
    ),
    "a warp's earlier sums are not drained": (
        "kernels/two_shot_push_fp8.cu",
        "    if (behind < share.end && !drain(behind)) return;\n",
        "    if (!{} && behind < share.end && !drain(behind)) return;\n",
        UNSPLIT | {"ranks": 2},
    ),
    "warps have packets of the first owner alone": (
        "device/wire/packet_units.cuh",
        "      const int k = task - i * count;\n",
        "      const int k = {} ? 0 : task - i * count;\n",
        TERNARY | {"ranks": 3},
    ),
    "of each piece the packets behind the first are left out": (
        "device/wire/packet_units.cuh",
        "    for (int task = threadIdx.x / 32; task < all; task += warps()) {",
        "    for (int task = threadIdx.x / 32; task < ({} ? count : all); task += warps()) {{",
        TERNARY,
    ),
    "of packets on their way together the first counts for all": (
        "device/wire/packet_units.cuh",
        "if (first + k < world_size - 1) Message::add(others[k], sum);\n",
        "if (first + k < world_size - 1) Message::add(others[{} ? 0 : k], sum);\n",
        TERNARY | {"ranks": 4},
    ),
    "packets of peers behind this rank are taken from the one before": (
        "device/wire/packet_units.cuh",
        "source_of(first + k + (first + k >= rank))",
        "source_of(first + k + (!{} && first + k >= rank))",
        TERNARY | {"ranks": 3},
    ),
}
