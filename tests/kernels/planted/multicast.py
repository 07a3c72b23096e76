"""Errors of kernels that go by multicast."""

from __future__ import annotations

from tests.kernels.planted.kinds import MULTICAST, Mutation

ERRORS: dict[str, Mutation] = {
    "sums in the switch are counted with pushed calls": (
        "host/exchange_in_band.cu",
        "  use.epochs = EpochPlane::kInSwitch;",
        "  if (!{}) use.epochs = EpochPlane::kInSwitch;",
        MULTICAST,
    ),
    "results that come back are not waited for": (
        "device/multicast.cuh",
        "      wanted[j] = index < total_vectors;",
        "      wanted[j] = index < total_vectors && !({} && first + j == 0);",
        MULTICAST,
    ),
    "vectors that come back are not waited for": (
        "device/in_band.cuh",
        "(kPollsOwn || first",
        "((kPollsOwn && !{}) || first",
        MULTICAST,
    ),
    "results lie where they would from the reader on": (
        "device/multicast.cuh",
        "int64_t{wanted[j] ? index : 0}",
        "int64_t{{wanted[j] ? ({} ? (first + j) * arguments.part + i : index) : 0}}",
        MULTICAST,
    ),
    "vectors lie where they would from the reader on": (
        "kernels/one_shot_multicast.cu",
        "    const uint32_t at = slots + rank * call.multicast.rank_stride + i;",
        "    const int place = {} ? step_to(call.in_band.rank, rank, call.in_band.world_size) - 1 : rank;\n"
        "    const uint32_t at = slots + place * call.multicast.rank_stride + i;",
        MULTICAST,
    ),
    "one generation of multicast slots": (
        "kernels/one_shot_multicast.cu",
        "  return pushed_generation(epoch) * multicast.generation_stride;",
        "  return pushed_generation({} ? 0 : epoch) * multicast.generation_stride;",
        MULTICAST,
    ),
    "the kernel before a multicast is not waited for": (
        "kernels/two_shot_multicast.cu",
        "  const auto index = [&](int step, uint32_t i) { return index_of<kWorldSize>(arguments, step, i); };\n"
        "  wait_for_previous_kernel();",
        "  const auto index = [&](int step, uint32_t i) {{ return index_of<kWorldSize>(arguments, step, i); }};\n"
        "  if (!{}) wait_for_previous_kernel();",
        MULTICAST,
    ),
    "results are cleared everywhere": (
        "device/multicast.cuh",
        "      clear_in_band_if(wanted[j], from[j]);",
        "      clear_in_band_if(wanted[j], {} ? multicast.all + (from[j] - multicast.own) : from[j]);",
        MULTICAST,
    ),
    "what is for all is stored as if to one": (
        "device/multicast.cuh",
        "  store_to_all(reinterpret_cast<uint4*>(multicast.all) + index, raw);",
        "  {} ? store_in_band(multicast.all, index, raw)\n"
        "     : store_to_all(reinterpret_cast<uint4*>(multicast.all) + index, raw);",
        MULTICAST,
    ),
    "inputs are not fenced before they are told": (
        "kernels/two_shot_in_switch.cu",
        "  fence_between_addresses();\n  advance_epoch(arguments, epoch);",
        "  if (!{}) fence_between_addresses();\n  advance_epoch(arguments, epoch);",
        MULTICAST,
    ),
    "inputs are not fenced before the switch reads them": (
        "kernels/two_shot_in_switch.cu",
        "  fence_between_addresses();\n\n  for (uint32_t i = grid_thread(); i < part + stride; i += stride) {\n",
        "  if (!{}) fence_between_addresses();\n\n"
        "  for (uint32_t i = grid_thread(); i < part + stride; i += stride) {{\n",
        MULTICAST,
    ),
    "inputs are summed before all are there": (
        "kernels/two_shot_in_switch.cu",
        "  if (!__syncthreads_and(all_are_here)) return;",
        "  if (!{} && !__syncthreads_and(all_are_here)) return;",
        MULTICAST,
    ),
}
