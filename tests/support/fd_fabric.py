"""The real driver, with memory that travels between processes of one host as files do: a domain of two GPUs at hand.

Everything else is real: the memory, its mappings, and what kernels store there. A fabric handle's 64 bytes say where
the file is handed out.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import threading
from typing import Any

from llm_allreduce_plugin.transport.driver import (
    FABRIC_HANDLE_BYTES,
    FABRIC_SUPPORTED,
    SUCCESS,
    Properties,
    load,
)
from tests.support.fake_fabric import INVALID_HANDLE, hand_out, target

FILE_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_PREFIX = "\0fd-fabric-"


def _as_file(properties: Properties) -> Properties:
    copy = Properties.from_buffer_copy(bytes(properties))
    copy.handle_types = FILE_DESCRIPTOR
    return copy


class FdEntryPoints:
    """Of one process."""

    def __init__(self) -> None:
        self._real = load()
        self._listeners: list[socket.socket] = []
        self.exported = self.imported = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def cuDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:
        if attribute.value == FABRIC_SUPPORTED:
            target(value).value = 1
            return SUCCESS
        return int(self._real.cuDeviceGetAttribute(value, attribute, device))

    def cuMemGetAllocationGranularity(self, granularity: Any, properties: Any, option: Any) -> int:
        copy = _as_file(target(properties))
        return int(self._real.cuMemGetAllocationGranularity(granularity, ctypes.byref(copy), option))

    def cuMemCreate(self, handle: Any, size: Any, properties: Any, flags: Any) -> int:
        copy = _as_file(target(properties))
        return int(self._real.cuMemCreate(handle, size, ctypes.byref(copy), flags))

    def cuMemExportToShareableHandle(self, data: Any, handle: Any, _kind: Any, flags: Any) -> int:
        file = ctypes.c_int(-1)
        kind = ctypes.c_int(FILE_DESCRIPTOR)
        status = int(self._real.cuMemExportToShareableHandle(ctypes.byref(file), handle, kind, flags))
        if status != SUCCESS:
            return status
        name = secrets.token_hex(16)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(_PREFIX + name)
        listener.listen(128)
        self._listeners.append(listener)
        threading.Thread(target=hand_out, args=(listener, file.value), daemon=True).start()
        ctypes.memmove(target(data), name.encode().ljust(FABRIC_HANDLE_BYTES, b"\0"), FABRIC_HANDLE_BYTES)
        self.exported += 1
        return SUCCESS

    def cuMemImportFromShareableHandle(self, handle: Any, data: Any, _kind: Any) -> int:
        name = bytes(target(data)).rstrip(b"\0").decode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.settimeout(10)
            peer.connect(_PREFIX + name)
            _, files, _, _ = socket.recv_fds(peer, 1, 1)
        if not files:
            return INVALID_HANDLE
        try:
            kind = ctypes.c_int(FILE_DESCRIPTOR)
            status = int(self._real.cuMemImportFromShareableHandle(handle, ctypes.c_void_p(files[0]), kind))
        finally:
            os.close(files[0])
        self.imported += status == SUCCESS
        return status

    def end(self) -> None:
        """Hand out nothing any more."""
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._listeners.clear()
