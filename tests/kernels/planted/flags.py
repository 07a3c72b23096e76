"""Errors of kernels that wait for flags: on one chunk, in stages, around a ring, over domains."""

from __future__ import annotations

from tests.kernels.planted.kinds import FLAGGED, HIERARCHICAL, RING, STAGED, Mutation

ERRORS: dict[str, Mutation] = {
    "a flag does not wait for the stores before it": (
        "device/lane.cuh",
        "      if (is_meant(peer, peers))\n        store_release_system(",
        "      if ({} && is_meant(peer, peers))\n"
        "        store_weak(flag_row(workspace_.base[peer], workspace_.layout, plane, index()) + workspace_.rank,\n"
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
    "the counterpart is not waited for": (
        "device/hierarchical_flags.cuh",
        "    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_EXCHANGE,",
        "    if (!{} && !lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_EXCHANGE,",
        HIERARCHICAL,
    ),
}
