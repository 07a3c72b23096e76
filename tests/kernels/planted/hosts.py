"""Errors of the halves of an all-reduce over several hosts."""

from __future__ import annotations

from tests.kernels.planted.kinds import HOSTS, Mutation

ERRORS: dict[str, Mutation] = {
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
}
