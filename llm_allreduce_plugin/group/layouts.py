"""How large workspaces are and how they are laid out: the communicator's, and those that `explain` speaks of.

Needs no torch and no GPU, so that a decision can be made anywhere as it is made on the node.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms import staging
from llm_allreduce_plugin.algorithms.facts import (
    LARGEST_WORLD_SIZE,
    PAIR,
    GroupFacts,
    hosts_obstacle,
    world_size_obstacle,
)
from llm_allreduce_plugin.algorithms.low_precision_algorithm import algorithm_of, needs_flags
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, LowPrecisionAlgorithm, TransportChoice
from llm_allreduce_plugin.topology.links import Transport

# In band, a message of 64 MiB, a prefill of 4096 x 8192 in 16 bits, takes one round over four GPUs, and one of 48 MiB
# over two. Larger ones take more, each of which costs 2 to 3 us: at most 1.7 % of what 384 MiB take, with two thirds of
# these bytes 2.5 % (benchmarks/h100/workspace_sizes_tp2.json, workspace_sizes_tp4.json).
DEFAULT_GPU_WORKSPACE_BYTES = 192 << 20
PAIR_GPU_WORKSPACE_BYTES = 96 << 20  # of two ranks
FLAGGED_GPU_WORKSPACE_BYTES = 384 << 20  # where kernels wait for flags: with less they were not measured
DEFAULT_CPU_WORKSPACE_BYTES = 4 << 20
# Of all ranks together. Pinned, and in /dev/shm only for containers that share nothing else; Docker gives that 64 MiB.
DEFAULT_HOST_WORKSPACE_BYTES = 48 << 20
HOST_LANES = 64  # blocks: few are enough for PCIe
RING_HOST_LANES = 32  # whose slots hold a packet of any format as it is, by default with up to 8 ranks
FLAGGED_SHARE = 4  # of a GPU's workspace, where a wire format or an algorithm needs flags
STAGED_IN_BAND_SHARE = 4  # of a GPU's workspace, where large messages are staged
HOST_IN_BAND_SHARE = 3  # of a workspace in host memory; the rest is for larger messages


def transport_obstacle(config: AllReduceConfig, world_size: int, hosts: Sequence[int], device_type: str) -> str | None:
    """Why not to try to share memory at all, or None. ``hosts``: of each rank. ``device_type``: as torch calls it."""
    if config.allreduce_strategy is AllReduceStrategy.NCCL:
        return "allreduce_strategy is NCCL"
    if (reason := hosts_obstacle(hosts)) is not None:
        return reason
    number = len(set(hosts)) or 1
    if number == 1 and (reason := world_size_obstacle(world_size)) is not None:
        return reason
    if number > _C.MAX_HOSTS or world_size // number > LARGEST_WORLD_SIZE:
        limits = f"{LARGEST_WORLD_SIZE} on each of {_C.MAX_HOSTS}"
        return f"no kernel for {world_size} ranks on {number} hosts (there are for {limits})"
    if device_type not in ("cpu", "cuda"):
        return f"no kernels for device type {device_type}"
    return None


def peer_refusal(environment: Mapping[str, str] | None = None) -> str | None:
    """The variable by which a user keeps GPUs from each other's memory, as it is set, or None.

    NCCL's, because whoever found peer access broken has set it for NCCL: ``NCCL_P2P_DISABLE``, or ``NCCL_P2P_LEVEL`` at
    its lowest level. ``environment``: instead of this process's.
    """
    variables = os.environ if environment is None else environment
    if variables.get("NCCL_P2P_DISABLE", "").strip() == "1":
        return "NCCL_P2P_DISABLE=1"
    if (level := variables.get("NCCL_P2P_LEVEL", "").strip()) in ("LOC", "0"):
        return f"NCCL_P2P_LEVEL={level}"
    return None


def refusal_note(transport: TransportChoice, refusal: str | None) -> str | None:
    """What follows from ``refusal``, in words, or None.

    Only ``transport: auto`` heeds it: ``peer`` asks for peers' memory by name, and so comes over it.
    """
    if refusal is None or transport is TransportChoice.HOST:
        return None
    if transport is TransportChoice.PEER:
        return f"{refusal} is ignored: transport peer was set, and overrides it"
    return f"all-reduce uses host memory, not peer access between GPUs: {refusal}; set transport to peer to override it"


def transports(config: AllReduceConfig, device_type: str, refusal: str | None = None) -> tuple[Transport, ...]:
    """How ranks may share memory, best first. ``refusal``: of :func:`peer_refusal`, the same on every rank."""
    if device_type == "cpu":
        return (Transport.SHM,)
    if refusal is not None and config.transport is TransportChoice.AUTO:
        return (Transport.HOST,)
    return {
        TransportChoice.AUTO: (Transport.SYMMETRIC, Transport.HOST),
        TransportChoice.PEER: (Transport.SYMMETRIC,),
        TransportChoice.HOST: (Transport.HOST,),
    }[config.transport]


def host_layout(world_size: int, lanes: int, size: int) -> _C.Layout:
    """How ``size`` bytes of a rank's workspace in host memory are laid out.

    Raises:
        ValueError: they are too few.
    """
    in_band = size // HOST_IN_BAND_SHARE
    return _C.make_layout(world_size, lanes, in_band_bytes=in_band, flagged_bytes=size - in_band, shared=True)


def _layout_of_host(config: AllReduceConfig, facts: GroupFacts, multiprocessors: int) -> _C.Layout:
    """Of a rank's workspace among the ranks of its host, where sums are exchanged between hosts: all by flags."""
    world_size = facts.local_size
    if facts.transport is Transport.SYMMETRIC:
        lanes, default = min(_C.MAX_LANES, 2 * multiprocessors), FLAGGED_GPU_WORKSPACE_BYTES
    elif facts.transport is Transport.HOST:
        lanes, default = HOST_LANES, DEFAULT_HOST_WORKSPACE_BYTES // world_size
    else:
        lanes, default = 1, DEFAULT_CPU_WORKSPACE_BYTES
    size = int(config.workspace_bytes or default)
    return _C.make_layout(world_size, lanes, flagged_bytes=size, shared=facts.transport is not Transport.SYMMETRIC)


def workspace_layout(config: AllReduceConfig, facts: GroupFacts, multiprocessors: int) -> _C.Layout:
    """The layout of a rank's workspace for the transport that ``facts`` name.

    ``multiprocessors``: of the smallest GPU if they differ, for grids must be alike.

    Raises:
        ValueError: ``workspace_bytes`` is too little for so many ranks.
    """
    wanted, world_size = config.workspace_bytes, facts.local_size
    if facts.crosses_network:
        return _layout_of_host(config, facts, multiprocessors)
    compresses = config.allreduce_strategy is AllReduceStrategy.LOWPRECISION
    if facts.transport is Transport.SHM:
        size = int(wanted or DEFAULT_CPU_WORKSPACE_BYTES)
        return _C.make_layout(world_size, 1, flagged_bytes=size, shared=True)
    if facts.transport is Transport.HOST:
        size = int(wanted or DEFAULT_HOST_WORKSPACE_BYTES // world_size)
        is_ring = compresses and algorithm_of(config, facts).algorithm is LowPrecisionAlgorithm.RING
        return host_layout(world_size, RING_HOST_LANES if is_ring else HOST_LANES, size)
    staged = staging.refusal(config, facts) is None and config.allreduce_strategy is not AllReduceStrategy.ONESHOT
    flags = not config.in_band or staged or (compresses and needs_flags(config, facts))
    default = PAIR_GPU_WORKSPACE_BYTES if world_size == PAIR else DEFAULT_GPU_WORKSPACE_BYTES
    size = int(wanted or (FLAGGED_GPU_WORKSPACE_BYTES if flags else default))
    lanes = min(_C.MAX_LANES, 2 * multiprocessors)  # two blocks to a multiprocessor
    flagged = 0
    if not config.in_band:
        flagged = size
    elif staged:
        flagged = size - size // STAGED_IN_BAND_SHARE
    elif flags:
        flagged = size // FLAGGED_SHARE
    return _C.make_layout(world_size, lanes, in_band_bytes=size - flagged, flagged_bytes=flagged)
