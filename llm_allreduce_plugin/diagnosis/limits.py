"""What the system allows a process: shared memory, pinned memory, memory, and what a container takes away."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

from llm_allreduce_plugin.base.containers import CGROUP, memory_of_container
from llm_allreduce_plugin.diagnosis.finding import Finding, ok, warn
from llm_allreduce_plugin.transport import nameless

MIB = 1 << 20
DOCKER_SHM_BYTES = 64 * MIB  # a container's default
ENGINE_SHM_BYTES = 64 * MIB  # what vLLM's message queues and NCCL take beside ours, roughly
UNLIMITED = resource.RLIM_INFINITY


def size(count: int) -> str:
    """In MiB, or GiB from one on."""
    return f"{count / (1 << 30):.4g} GiB" if count >= 1 << 30 else f"{count / MIB:.4g} MiB"


def shared_memory(
    wanted: int,
    *,
    needed: bool,
    available: Callable[[], int | None] = nameless.available_bytes,
    folder: str = str(nameless.SHM_FOLDER),
    statvfs: Callable[[str], os.statvfs_result] = os.statvfs,
) -> Finding:
    """Room for ``wanted`` bytes that ranks share, and for what others keep in ``/dev/shm``.

    ``needed``: ranks have no other way to reach each other. What they share counts against the memory of machine and
    container (:mod:`llm_allreduce_plugin.transport.nameless`), not against the size of ``/dev/shm``.
    """
    memory = available()
    text = f"{'memory of unknown size' if memory is None else size(memory)} available; "
    text += f"all ranks together want {size(wanted)}"
    if memory is not None and memory < wanted:
        fallback = "the engine's NCCL would run instead" if needed else "wanted only where GPUs have no peer access"
        return warn(
            "shared memory", f"{text}; {fallback}", "more memory, or set LLM_ALLREDUCE_WORKSPACE_BYTES (per rank) lower"
        )
    more = "start the container with --ipc=host or --shm-size=1g (Kubernetes: an emptyDir of medium Memory on /dev/shm)"
    try:
        state = statvfs(folder)
    except OSError as error:
        return warn("shared memory", f"{text}; {folder}, for the engine and NCCL: {error.strerror}", more)
    free, total = state.f_bavail * state.f_frsize, state.f_blocks * state.f_frsize
    text += f"; {folder}, for the engine and NCCL, has {size(free)} free of {size(total)}"
    if free < ENGINE_SHM_BYTES or total <= DOCKER_SHM_BYTES:
        return warn("shared memory", text, more)
    return ok("shared memory", text)


def pinned_memory(wanted: int, *, needed: bool, limit: int | None = None) -> Finding:
    """The limit on locked memory. The CUDA driver usually pins past it; what it does is proved by doing it."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    if soft == UNLIMITED:
        return ok("locked memory", "unlimited")
    text = f"limited to {size(soft)} (ulimit -l)"
    if not needed or soft >= wanted:
        return ok("locked memory", text)
    advice = "if pinning fails below, or for InfiniBand: docker --ulimit memlock=-1, or limits.conf"
    return warn("locked memory", f"{text}, {size(wanted)} are pinned; most drivers do not count them", advice)


def memory_limit(wanted: int, folder: Path = CGROUP) -> Finding:
    """The control group's limit: shared memory counts against it."""
    found = memory_of_container(folder)
    if found is None:
        return ok("memory limit", "no control group says one")
    if found.limit is None:
        return ok("memory limit", f"none; {size(found.used)} in use")
    left = found.limit - found.used
    text = f"{size(left)} left of {size(found.limit)}"
    if left < 2 * wanted:
        advice = "raise the container's memory limit: the kernel kills a rank that reaches it, without an error"
        return warn("memory limit", f"{text}; workspaces want {size(wanted)}", advice)
    return ok("memory limit", text)


def container(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Finding:
    """Whether this is a container, and what of it matters."""
    kinds = [
        ("Docker", (root / ".dockerenv").exists()),
        ("Podman", (root / "run" / ".containerenv").exists()),
        ("Kubernetes", "KUBERNETES_SERVICE_HOST" in environment),
    ]
    kind = next((name for name, found in kinds if found), None)
    if kind is None:
        return ok("container", "none that is known")
    return ok("container", f"{kind}: keep all ranks of a group in this one container, or start theirs with --ipc=host")
