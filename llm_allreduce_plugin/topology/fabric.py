"""Whether GPUs of several hosts are in one NVLink domain, by what NVML and the driver say of each. Pure.

That is a word, not a proof: an H100 may say "completed" with a valid cluster UUID and be in no domain at all. What this
module lets pass is proved with real bytes when a group starts (``transport/fabric_probe.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_allreduce_plugin.errors import ranks_with
from llm_allreduce_plugin.topology.node import Fabric

COMPLETED = "completed"
SUCCESS = "success"
# What GPUs report whose clique nobody has set; equal on racks that have nothing to do with each other.
PLACEHOLDER_CLIQUE = 32766
_SHOWN_DIGITS = 8  # of a cluster UUID


def ranks_in_words(ranks: Sequence[int]) -> str:
    """``"rank 2"``, ``"ranks 0-3"`` or ``"ranks 0-3, 8"``; ``ranks``: ascending."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' * (len(ranks) != 1)} {text}"


def gpu_obstacle(fabric: Fabric | None) -> str | None:
    """Why a GPU is in no NVLink domain that other hosts could be in, too, or None."""
    if fabric is None:
        return "NVML reports no NVLink fabric for this GPU"
    if fabric.state != COMPLETED:
        return f"fabric state is {fabric.state!r}, must be {COMPLETED!r} (is nvidia-fabricmanager or nvidia-imex up?)"
    if fabric.status not in ("", SUCCESS):
        return f"fabric status is {fabric.status!r}, must be {SUCCESS!r}"
    if not fabric.cluster_uuid.strip("0-"):
        return "the cluster UUID is all zero, which names no domain"
    if fabric.handles is False:
        return "the driver has no fabric handles for this GPU, whatever its fabric state"
    if fabric.imex_channel is False:
        return (
            "no IMEX channel can be opened (/dev/nvidia-caps-imex-channels), and without one no "
            "memory of another host can be imported"
        )
    return None


def domain_name(fabric: Fabric) -> str:
    """``"5f6c1d3a... clique 3"``: short enough for a log line, long enough to compare with ``nvidia-smi -q``."""
    return f"{fabric.cluster_uuid.replace('-', '')[:_SHOWN_DIGITS]}... clique {fabric.clique_id}"


def domain_obstacle(fabrics: Sequence[Fabric | None]) -> str | None:
    """Why the GPUs of these ranks are not in one NVLink domain, by NVML's and the driver's word; None: they are.

    A domain is a cluster UUID and a clique together: neither tells domains apart alone.

    Args:
        fabrics: of each rank's GPU, in rank order; None where NVML tells nothing.
    """
    faults = {rank: fault for rank, fabric in enumerate(fabrics) if (fault := gpu_obstacle(fabric)) is not None}
    if faults:
        first = next(iter(faults.values()))
        return f"{ranks_in_words([rank for rank, fault in faults.items() if fault == first])}: {first}"
    known = [fabric for fabric in fabrics if fabric is not None]
    domains = ranks_with(map(_key, known))
    if len(domains) <= 1:
        return None
    members = "; ".join(f"{ranks_in_words(ranks)} in {domain_name(known[ranks[0]])}" for ranks in domains.values())
    text = f"the ranks are in {len(domains)} NVLink domains: {members}"
    if all(fabric.clique_id == PLACEHOLDER_CLIQUE for fabric in known):
        text += f" ({PLACEHOLDER_CLIQUE} is a placeholder, equal on unrelated racks)"
    return text


def _key(fabric: Fabric) -> str:
    return f"{fabric.cluster_uuid.replace('-', '').lower()}/{fabric.clique_id}"


def domain_notes(fabrics: Sequence[Fabric | None]) -> tuple[str, ...]:
    """What stays open where :func:`domain_obstacle` finds nothing, in words."""
    known = [fabric for fabric in fabrics if fabric is not None]
    if not known or domain_obstacle(fabrics) is not None:
        return ()
    notes = [f"one NVLink domain over several hosts ({domain_name(known[0])}) as NVML says; proved at the start"]
    if known[0].clique_id == PLACEHOLDER_CLIQUE:
        notes.append(f"clique {PLACEHOLDER_CLIQUE} is a placeholder: only the cluster UUID tells this domain apart")
    for what, values in (
        ("the driver has fabric handles", [fabric.handles for fabric in known]),
        ("there is an IMEX channel", [fabric.imex_channel for fabric in known]),
    ):
        if None in values:
            unknown = [rank for rank, value in enumerate(values) if value is None]
            notes.append(f"not known whether {what} for {ranks_in_words(unknown)}")
    return tuple(notes)
