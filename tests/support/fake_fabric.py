"""A driver whose handles work between processes of one machine: memory is files, mapped wherever it is wanted.

It stands in for ``libcuda.so.1`` in :class:`~llm_allreduce_plugin.transport.driver.Driver`, which passes it the same C
values. What it lets through follows from a :class:`Truth`, which need not be what NVML says. It can be told to fail, or
never to answer, at any call.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

from llm_allreduce_plugin.topology.node import Fabric
from llm_allreduce_plugin.transport.driver import (
    FABRIC_HANDLE,
    FABRIC_HANDLE_BYTES,
    FABRIC_SUPPORTED,
    FILE_DESCRIPTOR,
    SUCCESS,
    Properties,
)

INVALID_VALUE, INVALID_HANDLE, NOT_PERMITTED, NOT_SUPPORTED, UNKNOWN = 1, 400, 800, 801, 999
NAMES = {
    INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE",
    INVALID_HANDLE: b"CUDA_ERROR_INVALID_HANDLE",
    NOT_PERMITTED: b"CUDA_ERROR_NOT_PERMITTED",
    NOT_SUPPORTED: b"CUDA_ERROR_NOT_SUPPORTED",
    UNKNOWN: b"CUDA_ERROR_UNKNOWN",
}
GRANULARITY = 64 << 10
# A call of each step of the probe, in order.
PHASES = ("cuMemCreate", "cuMemMap", "cuMemExportToShareableHandle", "cuMemImportFromShareableHandle", "cuMemSetAccess")
PHASES += ("cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FIXED, _MAP_ANONYMOUS, _PRIVATE, _SHARED = 0x10, 0x20, 0x02, 0x01
_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


@dataclasses.dataclass(frozen=True)
class Truth:
    """What holds of a GPU.

    Attributes:
        domain: of which NVLink domain it is; None: of none, so that memory cannot be made exportable.
        imex_channel: there is one; without it nothing of another host is imported.
        handles: what the driver says of fabric handles.
    """

    domain: str | None = "rack"
    imex_channel: bool = True
    handles: bool = True

    @classmethod
    def of(cls, fabric: Fabric | None) -> Truth:
        """As NVML has it, if that is true."""
        if fabric is None or fabric.state != "completed" or not fabric.cluster_uuid or fabric.handles is False:
            return cls(None, handles=False)
        return cls(f"{fabric.cluster_uuid}/{fabric.clique_id}", fabric.imex_channel is not False)


def target(argument: Any) -> Any:
    """What a ``byref`` points to."""
    return argument._obj


class FakeEntryPoints:
    """Of one process. ``misbehave``: called with the name of each call before it; a status is what it then returns.

    ``lose``: bytes that are written to memory of other ranks go nowhere.
    """

    def __init__(
        self, truth: Truth, misbehave: Callable[[str], int] = lambda _name: SUCCESS, *, lose: bool = False
    ) -> None:
        self.truth, self.lose, self._misbehave = truth, lose, misbehave
        self._files: dict[int, int] = {}  # handle -> file
        self._imported: set[int] = set()
        self._reserved: dict[int, int] = {}  # address -> bytes
        self._mapped: dict[int, tuple[int, int]] = {}  # address -> (bytes, handle)
        self._listeners: list[socket.socket] = []
        self._contexts = 0
        self._next = 1

    def __getattr__(self, name: str) -> Any:
        call = getattr(type(self), f"_{name}", None)
        if call is None:
            raise AttributeError(name)

        def checked(*arguments: Any) -> int:
            status = self._misbehave(name)
            return status or call(self, *arguments)

        return checked

    def left(self) -> dict[str, int]:
        """What has not been let go of."""
        return {
            "handles": len(self._files),
            "reserved": len(self._reserved),
            "mapped": len(self._mapped),
            "contexts": self._contexts,
        }

    def end(self) -> None:
        """Hand out nothing any more."""
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._listeners.clear()

    # -- the calls -----------------------------------------------------------------------------------------------------

    def _cuInit(self, flags: Any) -> int:
        return SUCCESS if flags.value == 0 else INVALID_VALUE

    def _cuDeviceGet(self, device: Any, ordinal: Any) -> int:
        target(device).value = ordinal.value
        return SUCCESS

    def _cuDevicePrimaryCtxRetain(self, context: Any, _device: Any) -> int:
        target(context).value = 0x1000
        self._contexts += 1
        return SUCCESS

    def _cuDevicePrimaryCtxRelease_v2(self, _device: Any) -> int:
        self._contexts -= 1
        return SUCCESS

    def _cuCtxSetCurrent(self, context: Any) -> int:
        return SUCCESS if context.value == 0x1000 else INVALID_VALUE

    def _cuCtxSynchronize(self) -> int:
        return SUCCESS

    def _cuDeviceGetAttribute(self, value: Any, attribute: Any, _device: Any) -> int:
        if attribute.value != FABRIC_SUPPORTED:
            return INVALID_VALUE
        target(value).value = int(self.truth.handles)
        return SUCCESS

    def _cuGetErrorName(self, status: Any, text: Any) -> int:
        name = NAMES.get(status.value)
        target(text).value = name
        return SUCCESS if name else INVALID_VALUE

    def _cuMemGetAllocationGranularity(self, granularity: Any, properties: Any, _option: Any) -> int:
        target(granularity).value = GRANULARITY
        return self._check(target(properties))

    def _check(self, properties: Properties) -> int:
        good = (properties.type, properties.location.type) == (1, 1)
        return SUCCESS if good and properties.handle_types in (FABRIC_HANDLE, FILE_DESCRIPTOR) else INVALID_VALUE

    def _cuMemCreate(self, handle: Any, size: Any, properties: Any, flags: Any) -> int:
        if (status := self._check(target(properties))) != SUCCESS or size.value % GRANULARITY or flags.value:
            return status or INVALID_VALUE
        if self.truth.domain is None and target(properties).handle_types == FABRIC_HANDLE:
            return NOT_SUPPORTED
        file = os.memfd_create("fake-fabric")
        os.ftruncate(file, size.value)
        target(handle).value = self._keep(file)
        return SUCCESS

    def _keep(self, file: int) -> int:
        handle, self._next = self._next, self._next + 1
        self._files[handle] = file
        return handle

    def _cuMemRelease(self, handle: Any) -> int:
        file = self._files.pop(handle.value, None)
        if file is None:
            return INVALID_VALUE
        self._imported.discard(handle.value)
        os.close(file)
        return SUCCESS

    def _cuMemExportToShareableHandle(self, data: Any, handle: Any, kind: Any, flags: Any) -> int:
        if flags.value or handle.value not in self._files:
            return INVALID_VALUE
        if kind.value == FILE_DESCRIPTOR:
            target(data).value = os.dup(self._files[handle.value])
            return SUCCESS
        if kind.value != FABRIC_HANDLE:
            return INVALID_VALUE
        name = f"{secrets.token_hex(8)}|{self.truth.domain}"[:FABRIC_HANDLE_BYTES].encode()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"\0fake-fabric-{name[:16].decode()}")
        listener.listen(128)
        self._listeners.append(listener)
        threading.Thread(target=hand_out, args=(listener, os.dup(self._files[handle.value])), daemon=True).start()
        ctypes.memmove(target(data), name.ljust(FABRIC_HANDLE_BYTES, b"\0"), FABRIC_HANDLE_BYTES)
        return SUCCESS

    def _cuMemImportFromShareableHandle(self, handle: Any, data: Any, kind: Any) -> int:
        if kind.value == FILE_DESCRIPTOR:
            target(handle).value = self._keep(os.dup(data.value or 0))
            self._imported.add(target(handle).value)
            return SUCCESS
        if kind.value != FABRIC_HANDLE:
            return INVALID_VALUE
        name, _, domain = bytes(target(data)).rstrip(b"\0").decode().partition("|")
        if not self.truth.imex_channel:
            return NOT_PERMITTED
        if domain != str(self.truth.domain)[: len(domain)] or not domain:
            return INVALID_HANDLE
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.settimeout(10)
            peer.connect(f"\0fake-fabric-{name}")
            _, files, _, _ = socket.recv_fds(peer, 1, 1)
        target(handle).value = self._keep(files[0])
        self._imported.add(target(handle).value)
        return SUCCESS

    def _cuMemAddressReserve(self, address: Any, size: Any, _alignment: Any, _wanted: Any, _flags: Any) -> int:
        found = _libc.mmap(None, size.value, _NONE, _PRIVATE | _MAP_ANONYMOUS, -1, 0)
        target(address).value = found
        self._reserved[found] = size.value
        return SUCCESS

    def _cuMemAddressFree(self, address: Any, size: Any) -> int:
        if self._reserved.pop(address.value, None) != size.value or address.value in self._mapped:
            return INVALID_VALUE
        return SUCCESS if _libc.munmap(address.value, size.value) == 0 else INVALID_VALUE

    def _cuMemMap(self, address: Any, size: Any, offset: Any, handle: Any, _flags: Any) -> int:
        if self._reserved.get(address.value) != size.value or offset.value or handle.value not in self._files:
            return INVALID_VALUE
        file = self._files[handle.value]
        if os.fstat(file).st_size != size.value:
            return INVALID_VALUE
        # Not to be touched before access is given.
        _libc.mmap(address.value, size.value, _NONE, _SHARED | _MAP_FIXED, file, 0)
        self._mapped[address.value] = (size.value, handle.value)
        return SUCCESS

    def _cuMemSetAccess(self, address: Any, size: Any, access: Any, count: Any) -> int:
        wanted = target(access)
        if (wanted.location.type, wanted.flags, count.value) != (1, 3, 1) or address.value not in self._mapped:
            return INVALID_VALUE
        return SUCCESS if _libc.mprotect(ctypes.c_void_p(address.value), size, _READ_WRITE) == 0 else INVALID_VALUE

    def _cuMemUnmap(self, address: Any, size: Any) -> int:
        if self._mapped.pop(address.value, (0, 0))[0] != size.value:
            return INVALID_VALUE
        _libc.mmap(address.value, size.value, _NONE, _PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED, -1, 0)
        return SUCCESS

    def _cuMemcpyHtoD_v2(self, address: Any, data: Any, size: Any) -> int:
        if not (self.lose and self._is_of_another(address.value)):
            ctypes.memmove(address.value, data, size.value)
        return SUCCESS

    def _cuMemcpyDtoH_v2(self, data: Any, address: Any, size: Any) -> int:
        ctypes.memmove(data, address.value, size.value)
        return SUCCESS

    def _is_of_another(self, address: int) -> bool:
        return any(
            start <= address < start + size and handle in self._imported
            for start, (size, handle) in self._mapped.items()
        )


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong on one rank: that call of it, ``call`` for the ``count``-th time, returns an error.

    With ``hangs`` it does not return. ``rank`` -1: nothing goes wrong.
    """

    rank: int = -1
    call: str = ""
    count: int = 1
    hangs: bool = False

    def on(self, rank: int) -> Callable[[str], int]:
        """How the driver of a rank misbehaves, see :class:`FakeEntryPoints`."""
        seen = 0

        def misbehave(name: str) -> int:
            nonlocal seen
            seen += name == self.call
            if rank != self.rank or name != self.call or seen != self.count:
                return SUCCESS
            if self.hangs:
                threading.Event().wait()
            return UNKNOWN

        return misbehave


def hand_out(listener: socket.socket, file: int) -> None:
    try:
        while True:
            peer, _ = listener.accept()
            with peer:
                socket.send_fds(peer, [b"\0"], [file])
    except OSError:
        pass  # closed
    finally:
        os.close(file)
