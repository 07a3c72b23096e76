"""The driver's calls for memory that other processes can map, through a table of entry points.

Nothing here knows of multicast: its entry points are in no table that this module makes (transport/multicast_driver.py
has them, where they are allowed).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable
from typing import Any, Protocol

SUCCESS = 0
FILE_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
FABRIC_HANDLE = 8  # CU_MEM_HANDLE_TYPE_FABRIC
FABRIC_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE, of a CUmemFabricHandle
FABRIC_SUPPORTED = 128  # CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_RECOMMENDED = 1  # CU_MEM_ALLOC_GRANULARITY_RECOMMENDED


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Flags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("gpu_direct_rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("win32_meta_data", ctypes.c_void_p),
        ("flags", _Flags),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class EntryPoints(Protocol):
    """``libcuda.so.1``, or what stands in for it: functions of these names that take C values and return a CUresult.

    cuInit, cuDeviceGet, cuDeviceGetAttribute, cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRelease_v2, cuCtxSetCurrent,
    cuCtxSynchronize, cuGetErrorName, cuMemGetAllocationGranularity, cuMemCreate, cuMemRelease,
    cuMemExportToShareableHandle, cuMemImportFromShareableHandle, cuMemAddressReserve, cuMemAddressFree, cuMemMap,
    cuMemUnmap, cuMemSetAccess, cuMemcpyHtoD_v2, cuMemcpyDtoH_v2.
    """

    def __getattr__(self, name: str) -> Any: ...  # noqa: ANN401


NAMES = (
    "cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent", "cuCtxSynchronize", "cuGetErrorName", "cuMemGetAllocationGranularity", "cuMemCreate",
    "cuMemRelease", "cuMemExportToShareableHandle", "cuMemImportFromShareableHandle", "cuMemAddressReserve",
    "cuMemAddressFree", "cuMemMap", "cuMemUnmap", "cuMemSetAccess", "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2",
)  # fmt: skip


class DriverError(RuntimeError):
    """A call of the driver failed. The text names the call, what it was for, and the error.

    ``status``: what the driver returned; 0: it has no such call. ``call``: its name; empty: another fault.
    """

    def __init__(self, message: str, status: int = 0, call: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.call = call


class Table:
    """Some entry points of a library, by name. Nothing else can be called through it, whatever the library has."""

    def __init__(self, library: object, names: Iterable[str]) -> None:
        self._library = library
        self._names = frozenset(names)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name not in self._names:
            raise AttributeError(name)
        return getattr(self._library, name)


def load(names: Iterable[str] = NAMES) -> EntryPoints:
    """The driver of this machine, as far as ``names`` go.

    Raises:
        DriverError: there is none.
    """
    try:
        return Table(ctypes.CDLL("libcuda.so.1"), names)
    except OSError as error:
        message = f"there is no CUDA driver: {error}"
        raise DriverError(message) from error


class Driver:
    """The memory of one GPU. Any thread may call; each call makes the GPU's context current first.

    Args:
        ordinal: of the GPU, as this process counts them.
        entry_points: instead of the driver's.
        handle_types: how memory that :meth:`create` makes can be exported.

    Raises:
        DriverError: there is no driver, or no such GPU.
    """

    needed_for = "memory that other processes map"  # what its calls came with, for errors

    def __init__(
        self, ordinal: int, entry_points: EntryPoints | None = None, handle_types: int = FABRIC_HANDLE
    ) -> None:
        self._entry_points = load() if entry_points is None else entry_points
        self._device = ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._retained = False
        self._do("cuInit", ctypes.c_uint(0))
        self._do("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(ordinal))
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._retained = True
        self._properties = Properties(
            type=_PINNED, handle_types=handle_types, location=Location(_ON_DEVICE, self._device.value)
        )

    @property
    def has_fabric_handles(self) -> bool:
        """Whether memory of this GPU can be exported to other hosts at all, by the driver's word."""
        value = ctypes.c_int()
        with contextlib.suppress(DriverError):  # older drivers do not know the question
            self._do("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(FABRIC_SUPPORTED), self._device)
        return bool(value.value)

    def rounded(self, size: int) -> int:
        """The bytes that an allocation of ``size`` takes.

        Raises:
            DriverError: the driver does not say.
        """
        granularity = ctypes.c_size_t()
        self._bound(
            "cuMemGetAllocationGranularity",
            ctypes.byref(granularity),
            ctypes.byref(self._properties),
            ctypes.c_int(_RECOMMENDED),
        )
        return -(-size // granularity.value) * granularity.value

    def create(self, size: int) -> int:
        """A handle of new memory that can be exported. ``size``: a multiple that :meth:`rounded` gives.

        Raises:
            DriverError: with the reason.
        """
        handle = ctypes.c_ulonglong()
        self._bound(
            "cuMemCreate",
            ctypes.byref(handle),
            ctypes.c_size_t(size),
            ctypes.byref(self._properties),
            ctypes.c_ulonglong(0),
        )
        return handle.value

    def export(self, handle: int) -> bytes:
        """What a process of another host needs to import it: ``FABRIC_HANDLE_BYTES`` bytes.

        Raises:
            DriverError: with the reason.
        """
        data = (ctypes.c_ubyte * FABRIC_HANDLE_BYTES)()
        self._bound(
            "cuMemExportToShareableHandle",
            ctypes.byref(data),
            ctypes.c_ulonglong(handle),
            ctypes.c_int(FABRIC_HANDLE),
            ctypes.c_ulonglong(0),
        )
        return bytes(data)

    def take(self, exported: bytes) -> int:
        """A handle of memory that another process has exported.

        Raises:
            DriverError: with the reason.
        """
        handle = ctypes.c_ulonglong()
        data = (ctypes.c_ubyte * FABRIC_HANDLE_BYTES)(*exported)
        self._bound(
            "cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.byref(data), ctypes.c_int(FABRIC_HANDLE)
        )
        return handle.value

    def export_file(self, handle: int) -> int:
        """A file descriptor by which another process of this host can import it. The caller closes it.

        Raises:
            DriverError: with the reason.
        """
        file = ctypes.c_int(-1)
        self._bound(
            "cuMemExportToShareableHandle",
            ctypes.byref(file),
            ctypes.c_ulonglong(handle),
            ctypes.c_int(FILE_DESCRIPTOR),
            ctypes.c_ulonglong(0),
        )
        return file.value

    def take_file(self, file: int) -> int:
        """A handle of what another process has exported. The descriptor stays open.

        Raises:
            DriverError: with the reason.
        """
        handle = ctypes.c_ulonglong()
        self._bound(
            "cuMemImportFromShareableHandle",
            ctypes.byref(handle),
            ctypes.c_void_p(file),
            ctypes.c_int(FILE_DESCRIPTOR),
        )
        return handle.value

    def release(self, handle: int) -> None:
        """The handle ends; memory goes with its last handle and mapping, in all processes.

        Raises:
            DriverError: with the reason.
        """
        self._bound("cuMemRelease", ctypes.c_ulonglong(handle))

    def map(self, handle: int, size: int, alignment: int = 0) -> int:
        """The address at which this GPU reads and writes the memory from now on.

        ``alignment``: what it must be a multiple of; 0: as the driver has it.

        Raises:
            DriverError: with the reason; nothing is left mapped.
        """
        address, length = ctypes.c_ulonglong(), ctypes.c_size_t(size)
        nothing, zero = ctypes.c_ulonglong(0), ctypes.c_size_t(0)
        self._bound("cuMemAddressReserve", ctypes.byref(address), length, ctypes.c_size_t(alignment), nothing, nothing)
        try:
            self._bound("cuMemMap", address, length, zero, ctypes.c_ulonglong(handle), nothing)
            try:
                access = Access(Location(_ON_DEVICE, self._device.value), _READ_WRITE)
                self._bound("cuMemSetAccess", address, length, ctypes.byref(access), ctypes.c_size_t(1))
            except DriverError:
                self._bound("cuMemUnmap", address, length)
                raise
        except DriverError:
            self._bound("cuMemAddressFree", address, length)
            raise
        return address.value

    def unmap(self, address: int, size: int) -> None:
        """The end of :meth:`map`. Nothing may run on it.

        Raises:
            DriverError: with the reason.
        """
        self._bound("cuMemUnmap", ctypes.c_ulonglong(address), ctypes.c_size_t(size))
        self._bound("cuMemAddressFree", ctypes.c_ulonglong(address), ctypes.c_size_t(size))

    def write(self, address: int, data: bytes) -> None:
        """Copy there, and wait until it has arrived.

        Raises:
            DriverError: with the reason.
        """
        self._bound("cuMemcpyHtoD_v2", ctypes.c_ulonglong(address), ctypes.c_char_p(data), ctypes.c_size_t(len(data)))
        self._bound("cuCtxSynchronize")

    def read(self, address: int, size: int) -> bytes:
        """Copy from there.

        Raises:
            DriverError: with the reason.
        """
        data = ctypes.create_string_buffer(size)
        self._bound("cuMemcpyDtoH_v2", data, ctypes.c_ulonglong(address), ctypes.c_size_t(size))
        return data.raw

    def close(self) -> None:
        """Let go of the context. Idempotent.

        Raises:
            DriverError: with the reason.
        """
        if self._retained:
            self._retained = False
            self._do("cuDevicePrimaryCtxRelease_v2", self._device)

    def _bound(self, name: str, *arguments: Any) -> None:  # noqa: ANN401
        self._do("cuCtxSetCurrent", self._context)
        self._do(name, *arguments)

    def _do(self, name: str, *arguments: Any) -> None:  # noqa: ANN401
        try:
            function = getattr(self._entry_points, name)
        except AttributeError:
            message = f"the CUDA driver has no {name}: it is too old for {self.needed_for}"
            raise DriverError(message, call=name) from None
        if (status := function(*arguments)) != SUCCESS:
            message = f"{name}: {self._name_of(status)}"
            raise DriverError(message, status, name)

    def _name_of(self, status: int) -> str:
        text = ctypes.c_char_p()
        if self._entry_points.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text)) != SUCCESS or not text.value:
            return f"CUDA error {status}"
        return f"{text.value.decode(errors='replace')} ({status})"
