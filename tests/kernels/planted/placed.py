"""Errors of kernels that store results into outputs of peers, or read inputs there."""

from __future__ import annotations

from tests.kernels.planted.kinds import PLACES, PULLED_PLACES, Mutation

ERRORS: dict[str, Mutation] = {
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
    "results are told while a copy more is under way": (
        "kernels/two_shot_place.cu",
        "  sender.complete<1>();",
        "  {} ? sender.complete<2>() : sender.complete<1>();",
        PLACES,
    ),
}
