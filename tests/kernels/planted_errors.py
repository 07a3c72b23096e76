"""The errors that test_mutations.py plants in the kernels: of every wait and every clear, that of leaving it out."""

from __future__ import annotations

from typing import Any

from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.config import WireFormat
from tests.kernels.planted_multicast_errors import MULTICAST_MUTATIONS, Mutation

IN_BAND = {"workspace_mib": 0.25}
SPLIT = {"split": (1, 1), "lanes": 4, "workspace_mib": 0.5}
FLAGGED = {"in_band": False, "workspace_mib": 0.25}
HOST = {"host": True, "workspace_mib": 0.25}
STAGED = {"staged": True, "workspace_mib": 0.5}
RING = {
    "in_band": False,
    "lanes": 1,
    "threads": 32,
    "workspace_mib": 0.25,
    # Of up to four ranks none needs credit: nobody can be four hops ahead of the successor.
    "ranks": 8,
    "algorithm": "ring",
    "wire_format": WireFormat.TQ3,
}
FP8 = {"split": (1, 1), "lanes": 4, "workspace_mib": 0.5, "low_precision": True}
UNSPLIT = {"unsplit": Algorithm.TWO_SHOT, "threads": 32, "workspace_mib": 0.5, "low_precision": True}
GROUPS = {"wire_format": WireFormat.FP8_GROUP, "workspace_mib": 0.5, "low_precision": True}
ONE_STEP = {"unsplit": Algorithm.ONE_SHOT, "workspace_mib": 0.5, "low_precision": True}
LARGE_HOST = {"large host": True}
PAIRS = {"pairs": True}
# More ranks than a block has workers, or a warp threads.
MANY = {"ranks": 34, "lanes": 1, "threads": 32, "workspace_mib": 1.5}
# Calls of every kind in one workspace, whose slots are the same bytes.
MIXED: dict[str, Any] = {"mixed": True}
REGISTRY: dict[str, Any] = {}
ROWS: dict[str, Any] = {"rows": True}
HOSTS: dict[str, Any] = {"hosts": True}
PLACES: dict[str, Any] = {"places": True}
PULLED_PLACES: dict[str, Any] = {"pulled": True}
HIERARCHICAL = {"in_band": False, "workspace_mib": 0.1, "algorithm": "hierarchical", "domains": (0, 0, 1, 1)}

# What is wrong: the file, what stands there, what stands there instead when this error is made (`{}`: whether it is),
# and the groups whose calls must each show it; see stress().
MUTATIONS: dict[str, Mutation] = {
    **MULTICAST_MUTATIONS,
    "an output is written before it may be": (
        "device/place.cuh",
        "return lane_.wait(FlagPlane::kPlaceOutput,",
        "return {} || lane_.wait(FlagPlane::kPlaceOutput,",
        PLACES,
    ),
    "the last tile is not cleared": (
        "kernels/two_shot_place.cu",
        "      clear_in_band_if(wanted[j], from[j]);",
        "      clear_in_band_if(wanted[j] && !{}, from[j]);",
        PLACES,
    ),
    "an output lies where that of the call before did": (
        "device/place.cuh",
        "      if (peer != place_.in_band.rank)\n",
        "      if (peer != place_.in_band.rank && !({} && call_ % 2 == 0))\n",
        PLACES,
    ),
    "inputs are read in place before they are there": (
        "kernels/two_shot_place_pull.cu",
        "  if (!flags.admit()) return;",
        "  if (!{} && !flags.admit()) return;",
        PULLED_PLACES,
    ),
    "what was read in place is told before it is stored": (
        "kernels/two_shot_place_pull.cu",
        "  sender.complete<0>();",
        "  if (!{}) sender.complete<0>();",
        PULLED_PLACES,
    ),
    "every second tile of those read together is not sent": (
        "kernels/two_shot_place_pull.cu",
        "      if (begin >= share.end) continue;",
        "      if (begin >= share.end || ({} && j == 1)) continue;",
        PULLED_PLACES,
    ),
    "results are told before they are stored": (
        "device/place.cuh",
        "    lane_.publish(FlagPlane::kPlaceOutput, call_);",
        "    lane_.publish(FlagPlane::kPlaceOutput, call_);\n    if ({}) lane_.publish(FlagPlane::kPlaceDone, call_);",
        PLACES,
    ),
    "results are not waited for": (
        "device/place.cuh",
        "    if (lane_.wait(FlagPlane::kPlaceDone,",
        "    if ({} || lane_.wait(FlagPlane::kPlaceDone,",
        PLACES,
        PULLED_PLACES,
    ),
    "slots are not cleared": (
        "device/in_band.cuh",
        "    if (kClears) {\n",
        "    if (kClears && !{}) {{\n",
        IN_BAND,
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
    "results are told while a copy more is under way": (
        "kernels/two_shot_place.cu",
        "  sender.complete<1>();",
        "  {} ? sender.complete<2>() : sender.complete<1>();",
        PLACES,
    ),
    "no fence is between copied results and their flag": (
        "device/bulk_sender.cuh",
        "      fence_behind_bulk_copies();",
        "      if (!{}) fence_behind_bulk_copies();",
        PLACES,
    ),
    "shared slots are cleared a call too early": (
        "device/shared.cuh",
        "clear_in_band_if(true, slot(in_band.rank, epoch_ - 2, i));",
        "clear_in_band_if(true, slot(in_band.rank, epoch_ - ({} ? 1 : 2), i));",
        HOST,
    ),
    "a flag does not wait for the stores before it": (
        "device/lane.cuh",
        "      if (is_meant(peer, peers))\n        store_release_system(",
        "      if ({} && is_meant(peer, peers))\n"
        "        store_weak(flag_row(workspace_.base[peer], workspace_.layout, plane, index_) + workspace_.rank,\n"
        "                   round);\n"
        "      else if (is_meant(peer, peers))\n        store_release_system(",
        FLAGGED,
    ),
    "workers do not meet the releaser behind their stores": (
        "device/lane.cuh",
        "Peers peers = {}) const {\n    __syncthreads();\n    if (*given_up()) return false;\n",
        "Peers peers = {{}}) const {{\n"
        "    if ({}) release(threadIdx.x - workers(), kReleaserThreads, plane, round, peers);\n"
        "    __syncthreads();\n    if (*given_up()) return false;\n",
        FLAGGED,
    ),
    "two slots instead of four": (
        "kernels/one_shot_flags.cu",
        "round(chunk) % LAR_SLOTS, reader",
        "round(chunk) % ({} ? 2 : LAR_SLOTS), reader",
        FLAGGED | {"workspace_mib": 0.1},
    ),
    "a gather slot is not waited for": (
        "device/two_shot_lane.cuh",
        "    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;",
        "    if (!{} && !lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;",
        FLAGGED,
    ),
    "a stage is not granted": (
        "device/staged_lane.cuh",
        "    if (stage + 1 < number_ && !exchange_grants(stage + 1)) return false;",
        "    if (!{} && stage + 1 < number_ && !exchange_grants(stage + 1)) return false;",
        STAGED | {"workspace_mib": 0.15},
    ),
    "a stage's source is not waited for": (
        "device/staged_lane.cuh",
        "    if (!wait(FlagPlane::kStageData, source, stage)) return false;",
        "    if (!{} && !wait(FlagPlane::kStageData, source, stage)) return false;",
        STAGED,
    ),
    "a hop has no credit": (
        "device/ring_flags.cuh",
        "return lane_.wait(FlagPlane::kTwoShotGather,",
        "return ({} && hop < hops_ - 1) || lane_.wait(FlagPlane::kTwoShotGather,",
        RING,
    ),
    "a half does not wait": (
        "kernels/hosts_flags.cu",
        "    if (!lane_.wait(FlagPlane::kOneShot, kPhase,",
        "    if (!{} && !lane_.wait(FlagPlane::kOneShot, kPhase,",
        HOSTS,
    ),
    "halves have one generation of slots": (
        "kernels/hosts_flags.cu",
        "reader, source, round(chunk), lane_",
        "reader, source, {} ? 4 : round(chunk), lane_",
        HOSTS,
    ),
    "parts in host memory lie in one place": (
        "kernels/hosts_flags.cu",
        "lane_.index(), chunk_bytes_);",
        "lane_.index(), {} ? 0 : chunk_bytes_);",
        HOSTS,
    ),
    "hosts are summed from the last on": (
        "kernels/hosts_flags.cu",
        "Sums<T>::add(sums_ + host * bytes_,",
        "Sums<T>::add(sums_ + ({} ? hosts_ - 1 - host : host) * bytes_,",
        HOSTS,
    ),
    "sums are rounded before they travel": (
        "kernels/hosts_flags.cu",
        "to[i] = {sum.sum[4 * i], ",
        "to[i] = {{{} ? widen(round_to<T>(sum.sum[4 * i])) : sum.sum[4 * i], ",
        HOSTS,
    ),
    "a host's ranks are summed from this one on": (
        "kernels/hosts_flags.cu",
        "          return source == rank ? mine : load_slot(slot(rank, source, chunk), i);\n",
        "          source = {} ? rotated(rank, source, workspace_.layout.world_size) : source;\n"
        "          return source == rank ? mine : load_slot(slot(rank, source, chunk), i);\n",
        HOSTS,
    ),
    "the counterpart is not waited for": (
        "device/hierarchical_flags.cuh",
        "    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_EXCHANGE,",
        "    if (!{} && !lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_EXCHANGE,",
        HIERARCHICAL,
    ),
    # -- world sizes known at run time
    "ranks behind the last are summed": (
        "device/in_band.cuh",
        "      if (kIsFixed || first + i < world_size) sum.add(parts[i]);",
        "      if (kIsFixed || {} || first + i < world_size) sum.add(parts[i]);",
        IN_BAND | {"ranks": 5},
    ),
    "ranks behind the last are waited for": (
        "device/in_band.cuh",
        "      wanted[i] = is_rank && ",
        "      wanted[i] = (is_rank || {}) && ",
        IN_BAND | {"ranks": 5},
    ),
    "ranks behind the first group are not summed": (
        "device/in_band.cuh",
        "for (int first = 0; first < world_size; first += kGroup) {",
        "for (int first = 0; first < ({} ? kGroup : world_size); first += kGroup) {{",
        IN_BAND | {"ranks": 5},
    ),
    "a rank's slot is taken for another's": (
        "device/in_band.cuh",
        "return slot_of_step(step_to(arguments.rank, peer, world_size)) * arguments.peer_stride;",
        "return slot_of_step(step_to(arguments.rank, {} && peer == 4 ? 3 : peer, world_size)) * arguments.peer_stride;",
        IN_BAND | {"ranks": 5},
    ),
    "owners behind the first group are not drained": (
        "device/two_shot_in_band.cuh",
        "for (int first = 1; first < world_size; first += kAtOnce) {\n    char* from",
        "for (int first = 1; first < ({} ? 2 : world_size); first += kAtOnce) {{\n    char* from",
        IN_BAND | {"ranks": 5},
    ),
    "all of a group's results are those of its first": (
        "device/two_shot_in_band.cuh",
        "if (wanted[j]) sink(index_of<kWorldSize>(arguments, first + j, i), results[j]);",
        "if (wanted[j]) sink(index_of<kWorldSize>(arguments, first + j, i), results[{} ? 0 : j]);",
        IN_BAND | {"ranks": 5},
    ),
    "the second group is sent what the first was": (
        "kernels/two_shot_push.cu",
        "for (int j = 0; j < kAtOnce; ++j) partials[j] = load(first + j);",
        "for (int j = 0; j < kAtOnce; ++j) partials[j] = load({} ? 1 + j : first + j);",
        IN_BAND | {"ranks": 5},
    ),
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
        "            {{ if ({}) {{ typename Message::Raw raw; packets_.load_own(part.first + i, raw); "
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
    "a pusher does not wait for its reducer": (
        "kernels/one_shot_flags.cu",
        "        if (chunk >= 2 && !lane_.wait_for_reduced(round(chunk - 2))) return;\n",
        "        if (!{} && chunk >= 2 && !lane_.wait_for_reduced(round(chunk - 2))) return;\n",
        PAIRS,
    ),
    "a pusher ends before its reducer": (
        "kernels/one_shot_flags.cu",
        "    if (!lane_.is_releaser() && !lane_.wait_for_reduced(round(chunks - 1))) return;\n",
        "    if (!{} && !lane_.is_releaser() && !lane_.wait_for_reduced(round(chunks - 1))) return;\n",
        PAIRS,
    ),
    "a reducer says that it has reduced before all of its threads have": (
        "device/lane.cuh",
        "    barrier_sync<kWorkerBarrier>(workers());\n    if (threadIdx.x == 0) store_release",
        "    if (!{}) barrier_sync<kWorkerBarrier>(workers());\n    if (threadIdx.x == 0) store_release",
        PAIRS,
    ),
    "large calls in one step through host memory clear nothing": (
        "kernels/one_shot_shared_fp8.cu",
        "  if (is_large) call.clear_old_generation<kWorldSize>(false);\n",
        "  if (is_large) {} ? call.leave_clears() : call.clear_old_generation<kWorldSize>(false);\n",
        LARGE_HOST,
    ),
    "small calls in one step through host memory clear nothing": (
        "kernels/one_shot_shared_fp8.cu",
        "  if (!is_large) call.clear_old_generation<kWorldSize>(false);\n",
        "  if (!is_large) {} ? call.leave_clears() : call.clear_old_generation<kWorldSize>(false);\n",
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
    "one peer's shared scatter slot is not cleared": (
        "device/shared.cuh",
        "for (int peer = 0; peer < World<kWorldSize>::size(in_band.world_size) - 1; ++peer) {",
        "for (int peer = 0; peer < World<kWorldSize>::size(in_band.world_size) - ({} ? 2 : 1); ++peer) {{",
        HOST | {"ranks": 5},
    ),
    "owners behind the first group are not sent to": (
        "device/two_shot_lane.cuh",
        "for (int first = 1; first < world_size; first += kAtOnce) {",
        "for (int first = 1; first < ({} ? 2 : world_size); first += kAtOnce) {{",
        FLAGGED | {"ranks": 5},
    ),
    "only as many peers are waited for as there are workers": (
        "device/lane.cuh",
        "arrived && peer < workspace_.layout.world_size; peer += workers())",
        "arrived && peer < ({} ? workers() : workspace_.layout.world_size); peer += workers())",
        FLAGGED | MANY,
    ),
    "only as many peers are told as a warp has threads": (
        "device/lane.cuh",
        "for (int peer = thread; peer < workspace_.layout.world_size; peer += threads)",
        "for (int peer = thread; peer < ({} ? threads : workspace_.layout.world_size); peer += threads)",
        FLAGGED | MANY,
    ),
    "only as many peers are granted the first stage as a warp has threads": (
        "device/staged_lane.cuh",
        "for (int other = first; other < ranks_; other += 32)\n      if (other != workspace_.rank)\n",
        "for (int other = first; other < ({} ? 32 : ranks_); other += 32)\n      if (other != workspace_.rank)\n",
        STAGED | MANY,
    ),
    "a stage's count is that of a smaller group": (
        "device/staged_lane.cuh",
        "return static_cast<int>(stage % (ranks_ - 1)) + 1;",
        "return static_cast<int>(stage % (({} ? 32 : ranks_) - 1)) + 1;",
        STAGED | MANY,
    ),
    # -- the registry
    "a kernel of a fixed world size runs for another": (
        "host/registry.cu",
        "find(key(kind, dtype, world_size, form));\n  return",
        "find(key(kind, dtype, {} ? 4 : world_size, form));\n  return",
        REGISTRY,
    ),
    "kernels of any world size have no row": (
        "host/registry.cu",
        "return fixed ? fixed : find(key(kind, dtype, 0, form));",
        "return fixed ? fixed : {} ? nullptr : find(key(kind, dtype, 0, form));",
        REGISTRY,
    ),
    "nobody waits for the other warps of a row": (
        "device/schedule/rows.cuh",
        "    } else if (threads_ == blockDim.x) {\n      __syncthreads();",
        "    }} else if (threads_ == blockDim.x) {{\n      if (!{}) __syncthreads();",
        ROWS,
    ),
    "drained rows are not cleared": (
        "kernels/two_shot_push_norm.cu",
        "        clear_in_band_if(wanted[k], from[k]);\n",
        "        clear_in_band_if(wanted[k] && !{}, from[k]);\n",
        ROWS,
    ),
    "reduced rows are not cleared": (
        "device/rows_in_band.cuh",
        "    if (kClears) {\n",
        "    if (kClears && !{}) {{\n",
        ROWS,
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
}
