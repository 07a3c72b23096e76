"""A node from NVML. Nothing here raises: what NVML does not tell is left unknown."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm_allreduce_plugin.base.validation import printable
from llm_allreduce_plugin.topology.node import Fabric, Gpu, Node

_T = TypeVar("_T")

_MOST_TEXT = 200  # characters of anything that a driver says
_MAX_NVLINKS = 18  # NVML_NVLINK_MAX_LINKS
_REMOTE_IS_SWITCH = 2  # NVML_NVLINK_DEVICE_TYPE_SWITCH
_COMMON_ANCESTOR = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}  # nvmlGpuTopologyLevel_t
_P2P_STATUS = {0: "OK", 1: "CNS", 2: "GNS", 3: "TNS", 4: "DR", 5: "NS"}  # nvmlGpuP2PStatus_t
_P2P_READ, _P2P_WRITE, _P2P_NVLINK = 0, 1, 2  # nvmlGpuP2PCapsIndex_t
_FABRIC_STATE = {0: "not supported", 1: "not started", 2: "in progress", 3: "completed"}  # nvmlGpuFabricState_t
_CU_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_CU_FABRIC_SUPPORTED = 128  # CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED
_CU_MULTICAST_SUPPORTED = 132  # CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED
_IMEX_CHANNELS = Path("/dev/nvidia-caps-imex-channels")


class _NoNvmlError(Exception):
    """NVML is not usable; the text says why."""


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    try:
        import pynvml
    except ImportError as error:
        message = "nvidia-ml-py is not installed"
        raise _NoNvmlError(message) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _NoNvmlError(str(error)) from error
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _ask(default: _T, question: Callable[..., Any], *arguments: object) -> Any | _T:  # noqa: ANN401
    """NVML's answer, or ``default`` where this driver, GPU or virtual machine has none."""
    try:
        return question(*arguments)
    except Exception:  # noqa: BLE001  (NVML errors, and AttributeError of older bindings)
        return default


def _text(value: str | bytes) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return printable(text.rstrip("\0"))[:_MOST_TEXT]


def _numa_node(pci_bus_id: str, devices: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """The NUMA node of a PCI device by the kernel's word; None: the kernel does not know it, which it calls -1.

    ``pci_bus_id``: as NVML has it, with a domain of 8 digits; sysfs has 4.
    """
    try:
        text = (devices / _bus_key(pci_bus_id) / "numa_node").read_text().strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isascii() and text.isdecimal() else None


class _FabricInfo(ctypes.Structure):
    """nvmlGpuFabricInfo_t. Ours, because older nvidia-ml-py releases declare it with a UUID of the wrong length."""

    _fields_ = (
        ("cluster_uuid", ctypes.c_ubyte * 16),
        ("status", ctypes.c_uint),
        ("clique_id", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
    )


def _fabric(nvml: Any, handle: Any, handles: int | None) -> Fabric | None:  # noqa: ANN401
    info = _FabricInfo()
    if _ask(None, lambda: nvml.nvmlDeviceGetGpuFabricInfo(handle, ctypes.byref(info)) or True) is None:
        return None
    status = "success" if info.status == 0 else _ask(str(info.status), lambda: str(nvml.NVMLError(info.status)))
    return Fabric(
        state=_FABRIC_STATE.get(info.state, str(info.state)),
        status=_text(status),
        cluster_uuid=bytes(info.cluster_uuid).hex() if any(info.cluster_uuid) else "",
        clique_id=info.clique_id,
        handles=None if handles is None else bool(handles),
        imex_channel=_has_imex_channel(),
    )


def _has_imex_channel(folder: Path = _IMEX_CHANNELS) -> bool | None:
    """Whether this user may open an IMEX channel, which memory of other hosts is imported through; None: not told."""
    try:
        return any(os.access(channel, os.R_OK | os.W_OK) for channel in folder.glob("channel*"))
    except OSError:
        return None


def _attribute_by_bus_id(attribute: int) -> dict[str, int]:
    """The driver's attribute of each GPU that this process sees. Only asks: no context, no multicast object."""
    found: dict[str, int] = {}
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return found
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return found
    for ordinal in range(count.value):
        device, value = ctypes.c_int(), ctypes.c_int()
        bus_id = ctypes.create_string_buffer(32)
        if (
            cuda.cuDeviceGet(ctypes.byref(device), ordinal) == 0
            and cuda.cuDeviceGetPCIBusId(bus_id, len(bus_id), device) == 0
            and cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == 0
        ):
            found[_bus_key(bus_id.value.decode())] = value.value
    return found


def _bus_key(pci_bus_id: str) -> str:
    domain, _, rest = pci_bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _active_nvlinks(nvml: Any, handle: Any) -> list[int]:  # noqa: ANN401
    return [link for link in range(_MAX_NVLINKS) if _ask(0, nvml.nvmlDeviceGetNvLinkState, handle, link) == 1]


def _p2p(nvml: Any, a: Any, b: Any) -> str:  # noqa: ANN401
    """Peer access needs both directions of use: a read and a write status that is not OK both count."""
    statuses = [_ask(None, nvml.nvmlDeviceGetP2PStatus, a, b, index) for index in (_P2P_READ, _P2P_WRITE)]
    known = [_P2P_STATUS.get(int(status), "?") for status in statuses if status is not None]
    if not known:
        return "?"
    return next((status for status in known if status != "OK"), "OK")


def detect() -> Node:
    """This node's GPUs. Empty, with a note, on a machine without NVML or GPUs."""
    try:
        with _nvml() as nvml:
            return _detect(nvml)
    except _NoNvmlError as error:
        return Node(source="nvml", note=_text(f"no NVML: {error}"))


def _detect(nvml: Any) -> Node:  # noqa: ANN401
    number = int(_ask(0, nvml.nvmlDeviceGetCount))
    answers = {index: _ask(None, nvml.nvmlDeviceGetHandleByIndex, index) for index in range(number)}
    # One that has fallen off the bus, or that a container may not use, is no reason to know nothing of the others.
    silent = [index for index, handle in answers.items() if handle is None]
    indices = [index for index in answers if index not in silent]
    handles = [answers[index] for index in indices]
    count = len(handles)
    multicast = _attribute_by_bus_id(_CU_MULTICAST_SUPPORTED)
    multiprocessors = _attribute_by_bus_id(_CU_MULTIPROCESSORS)
    exportable = _attribute_by_bus_id(_CU_FABRIC_SUPPORTED)
    gpus = []
    for index, handle in zip(indices, handles, strict=True):
        pci = _ask(None, nvml.nvmlDeviceGetPciInfo, handle)
        bus_id = _text(pci.busId) if pci is not None else ""
        has_multicast = multicast.get(_bus_key(bus_id))
        capability = _ask(None, nvml.nvmlDeviceGetCudaComputeCapability, handle)
        gpus.append(
            Gpu(
                index=index,
                name=_text(_ask("unknown", nvml.nvmlDeviceGetName, handle)),
                architecture=capability[0] * 10 + capability[1] if capability else None,
                multiprocessors=multiprocessors.get(_bus_key(bus_id)),
                pci_bus_id=bus_id,
                uuid=_text(_ask("", nvml.nvmlDeviceGetUUID, handle)),
                numa_node=_numa_node(bus_id),
                multicast=None if has_multicast is None else bool(has_multicast),
                fabric=_fabric(nvml, handle, exportable.get(_bus_key(bus_id))),
            )
        )

    nvlinks = [_active_nvlinks(nvml, handle) for handle in handles]
    behind_switch = [
        any(
            _ask(None, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link) == _REMOTE_IS_SWITCH
            for link in nvlinks[index]
        )
        for index, handle in enumerate(handles)
    ]
    links = [["X"] * count for _ in range(count)]
    p2p = [["X"] * count for _ in range(count)]
    for a in range(count):
        for b in range(count):
            if a == b:
                continue
            p2p[a][b] = _p2p(nvml, handles[a], handles[b])
            if a < b:
                links[a][b] = links[b][a] = _link(nvml, handles, nvlinks, behind_switch, a, b, gpus[b].pci_bus_id)
    all_to_all = count > 2 and all(  # noqa: PLR2004
        links[a][b] == f"NV{len(nvlinks[a])}" for a in range(count) for b in range(count) if a != b
    )
    return Node(
        source="nvml",
        gpus=tuple(gpus),
        links=tuple(map(tuple, links)),
        p2p=tuple(map(tuple, p2p)),
        # Each GPU cannot give all its links to each of several others, unless they meet in a switch.
        nvswitch=any(behind_switch) or all_to_all,
        driver=_text(_ask("", nvml.nvmlSystemGetDriverVersion)),
        note=_note(number, silent),
    )


def _note(number: int, silent: Sequence[int]) -> str:
    """What there is to say of so many GPUs, of which some do not answer."""
    if not silent:
        return "" if number else "NVML sees no GPU"
    return f"NVML gives no access to GPU {', '.join(map(str, silent))} of {number}: lost, or not for this process"


def _link(
    nvml: Any,  # noqa: ANN401
    handles: Sequence[Any],
    nvlinks: Sequence[list[int]],
    behind_switch: Sequence[bool],
    a: int,
    b: int,
    bus_id_of_b: str,
) -> str:
    if _ask(None, nvml.nvmlDeviceGetP2PStatus, handles[a], handles[b], _P2P_NVLINK) == 0:
        most = max(1, min(len(nvlinks[a]), len(nvlinks[b])))  # a virtual machine may hide how many there are
        if behind_switch[a]:
            return f"NV{most}"
        remotes = [_ask(None, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handles[a], link) for link in nvlinks[a]]
        direct = sum(
            remote is not None and _bus_key(_text(remote.busId)) == _bus_key(bus_id_of_b) for remote in remotes
        )
        # A virtual machine hides where links end; the driver says that NVLink joins the two.
        return f"NV{direct or most}"
    level = _ask(None, nvml.nvmlDeviceGetTopologyCommonAncestor, handles[a], handles[b])
    return "?" if level is None else _COMMON_ANCESTOR.get(int(level), "?")
