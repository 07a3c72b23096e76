"""GPUs, their links, who else uses them, and what on the way may drop peer access. Only asks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_allreduce_plugin.diagnosis.finding import Finding, fail, ok, warn
from llm_allreduce_plugin.diagnosis.limits import size
from llm_allreduce_plugin.group.multicast import node_outlook
from llm_allreduce_plugin.topology import NodeTopology
from llm_allreduce_plugin.topology.fabric import domain_name, domain_obstacle, gpu_obstacle

WORKSPACE_BYTES = 1 << 30  # a workspace, and what a CUDA context takes
_COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}
_ACS, _ACS_REDIRECTS = 0x000D, 0x000C  # extended capability; P2P request and completion redirect in its control word
_FIRST_EXTENDED, _CONFIG_BYTES, _BRIDGE = 0x100, 4096, "0x0604"


@dataclasses.dataclass(frozen=True)
class GpuState:
    """What may keep a GPU from being used; None: not told."""

    index: int
    mig: bool | None = None
    compute_mode: str | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None


def read_states() -> list[GpuState]:
    """From NVML; empty where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001  (not installed, no driver, no GPU)
        return []

    def ask(question: str, *arguments: object) -> Any:  # noqa: ANN401
        try:
            return getattr(pynvml, question)(*arguments)
        except Exception:  # noqa: BLE001  (not every GPU answers everything)
            return None

    states = []
    for index in range(ask("nvmlDeviceGetCount") or 0):
        handle = ask("nvmlDeviceGetHandleByIndex", index)
        mig, mode = ask("nvmlDeviceGetMigMode", handle), ask("nvmlDeviceGetComputeMode", handle)
        memory = ask("nvmlDeviceGetMemoryInfo", handle)
        states.append(
            GpuState(
                index,
                mig=None if mig is None else bool(mig[0]),
                compute_mode=None if mode is None else _COMPUTE_MODES.get(mode, str(mode)),
                free_bytes=None if memory is None else int(memory.free),
                total_bytes=None if memory is None else int(memory.total),
            )
        )
    ask("nvmlShutdown")
    return states


def gpus(topology: NodeTopology, *, hidden: int = 0) -> Finding:
    """Which are visible. ``hidden``: how many there are when none is."""
    if hidden:
        return fail("GPUs", f"none is visible of {hidden}: {topology.note}", "unset it to use GPUs")
    if not topology.gpus:
        return warn(
            "GPUs", f"none ({topology.note})", "on a GPU node: is the driver there, and passed to the container?"
        )
    names: dict[str, int] = {}
    for gpu in topology.gpus:
        label = f"{gpu.name} (sm_{gpu.architecture})" if gpu.architecture else gpu.name
        names[label] = names.get(label, 0) + 1
    text = " and ".join(f"{count} x {name}" for name, count in names.items())
    if len(names) > 1:
        return warn("GPUs", text, "a group must have GPUs of one architecture: choose them with CUDA_VISIBLE_DEVICES")
    if len(topology.gpus) == 1:
        return warn("GPUs", text, "nothing to do at tensor parallel 1, which has no all-reduces")
    return ok("GPUs", text)


def left_out(topology: NodeTopology) -> Finding | None:
    """Which GPUs NVML knows of and tells nothing about; None where there are none, or none at all."""
    if not topology.gpus or not topology.note:
        return None
    return warn("GPUs", topology.note, "nvidia-smi says more; a lost GPU needs a reset, or the node a restart")


def links(topology: NodeTopology) -> Finding:
    """How they are joined, by the driver's word."""
    kinds = dict.fromkeys(link for row in topology.links for link in row if link != "X")
    text = f"{', '.join(kinds)}{' through NVSwitch' if topology.nvswitch else ''}"
    if (fault := topology.p2p_fault()) is not None:
        advice = (
            "nothing: all-reduces go through pinned host memory, which is slower; `llm-allreduce topo` has the matrix"
        )
        return warn("links", f"{text}; {fault}", advice)
    return ok("links", f"{text}; the driver says that all pairs have peer access")


def multicast(topology: NodeTopology, environment: Mapping[str, str] = os.environ) -> Finding:
    """NVLink multicast and the fabric. Asks for attributes, and creates nothing."""
    fabrics = dict.fromkeys(gpu.fabric.state for gpu in topology.gpus if gpu.fabric is not None)
    text = f"multicast: {node_outlook(topology, len(topology.gpus), environment=environment)}"
    text += f"; fabric {', '.join(fabrics) if fabrics else 'none'}"
    unfinished = [state for state in fabrics if state in ("in progress", "not started")]
    if unfinished and topology.nvswitch:
        return fail("fabric", text, "NVLinks do not work before it is complete: is nvidia-fabricmanager running?")
    return ok("fabric", text)


def domain(topology: NodeTopology) -> Finding | None:
    """Whether tensor parallel over several hosts could run over NVLink; None on GPUs that are in no domain at all."""
    known = [gpu.fabric for gpu in topology.gpus if gpu.fabric is not None and gpu.fabric.cluster_uuid.strip("0-")]
    if not known:
        return None
    obstacle = next(filter(None, map(gpu_obstacle, known)), None) or domain_obstacle(known)
    names = ", ".join(dict.fromkeys(map(domain_name, known)))
    if obstacle is None:
        return ok("NVLink domain", f"{names}, as NVML says; check --torchrun proves it between hosts")
    return ok("NVLink domain", f"{names}; for ranks on several hosts NVLink is not used: {obstacle}")


def sharing(
    states: Sequence[GpuState], environment: Mapping[str, str] = os.environ, proc: Path = Path("/proc")
) -> list[Finding]:
    """MIG, compute modes, other users of the memory, and MPS."""
    found = []
    if split := [state.index for state in states if state.mig]:
        text = f"MIG is on for GPU {', '.join(map(str, split))}: its instances cannot reach each other's memory"
        found.append(warn("GPU sharing", text, "turn MIG off (nvidia-smi -mig 0) to run tensor parallel"))
    if closed := [state.index for state in states if state.compute_mode == "prohibited"]:
        text = f"compute mode of GPU {', '.join(map(str, closed))} is prohibited"
        found.append(fail("GPU sharing", text, "nvidia-smi -c DEFAULT"))
    full = [state for state in states if state.free_bytes is not None and state.free_bytes < WORKSPACE_BYTES]
    if full:
        text = ", ".join(f"GPU {state.index} has {size(state.free_bytes or 0)} free" for state in full)
        found.append(
            warn("GPU sharing", text, "end what uses it (nvidia-smi): a rank takes up to 384 MiB and a context")
        )
    if "CUDA_MPS_PIPE_DIRECTORY" in environment or _runs(proc, "nvidia-cuda-mps"):
        text = "MPS is in use: a rank's kernel that waits may keep others of the same GPU from running"
        found.append(warn("GPU sharing", text, "one rank to a GPU; stop MPS on GPUs that serve tensor parallel"))
    return found or [ok("GPU sharing", "no MIG, no MPS, memory free")]


def _runs(proc: Path, name: str) -> bool:
    for comm in proc.glob("[0-9]*/comm"):
        try:
            if comm.read_text().startswith(name[:15]):
                return True
        except OSError:
            continue
    return False


def has_acs_redirect(config: bytes) -> bool | None:
    """Whether a PCIe bridge sends its devices' peer traffic up to the CPU, from its configuration space.

    None when that part of it cannot be read, as by anyone but root. Capability layout: PCI Express base specification,
    Access Control Services.
    """
    if len(config) < _CONFIG_BYTES:
        return None
    offset, seen = _FIRST_EXTENDED, 0
    while offset and seen < _CONFIG_BYTES // 4:
        header = int.from_bytes(config[offset : offset + 4], "little")
        if header & 0xFFFF == _ACS:
            return bool(int.from_bytes(config[offset + 6 : offset + 8], "little") & _ACS_REDIRECTS)
        offset, seen = header >> 20, seen + 1
    return False


def peer_path(topology: NodeTopology, sys: Path = Path("/sys")) -> Finding:
    """IOMMU and ACS: what drops or detours peer traffic that the driver promises."""
    if topology.has_nvlink:
        return ok("PCIe path", "all pairs have NVLink, so that IOMMU and ACS do not matter")
    iommu = any((sys / "class" / "iommu").glob("*"))
    redirecting, unread = [], 0
    for device in (sys / "bus" / "pci" / "devices").glob("*"):
        try:
            if not (device / "class").read_text().startswith(_BRIDGE):
                continue
            redirects = has_acs_redirect((device / "config").read_bytes())
        except OSError:
            unread += 1
            continue
        unread += redirects is None
        redirecting += [device.name] if redirects else []
    text = f"IOMMU {'on' if iommu else 'off'}; ACS redirects peer traffic at "
    text += (
        f"{len(redirecting)} bridges" if redirecting or not unread else "an unknown number of bridges (root can tell)"
    )
    if redirecting or iommu:
        advice = "if peer access is not proved below: iommu=pt on the kernel's command line, ACS off in the BIOS"
        return warn("PCIe path", text, advice)
    return ok("PCIe path", text)
