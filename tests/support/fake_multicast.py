"""A driver that has multicast objects, for ranks that are threads: memory is memory, and a switch is a loop.

It stands in for ``libcuda.so.1`` in :class:`~llm_allreduce_plugin.transport.multicast_driver.MulticastDriver`, which
passes it the same C values. Nothing of CUDA is called. It insists on the order of calls that the driver asks for, and
can be told to fail, or not to answer, at any call of any rank.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

from llm_allreduce_plugin.transport import multicast_driver
from llm_allreduce_plugin.transport.driver import SUCCESS
from llm_allreduce_plugin.transport.multicast_driver import ILLEGAL_STATE, MULTICAST_SUPPORTED, NOT_READY, OUT_OF_MEMORY
from tests.support.fake_fabric import INVALID_HANDLE, INVALID_VALUE, UNKNOWN, target

NAMES = {
    INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE",
    OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY",
    INVALID_HANDLE: b"CUDA_ERROR_INVALID_HANDLE",
    ILLEGAL_STATE: b"CUDA_ERROR_ILLEGAL_STATE",
    NOT_READY: b"CUDA_ERROR_SYSTEM_NOT_READY",
    UNKNOWN: b"CUDA_ERROR_UNKNOWN",
}
MINIMUM, RECOMMENDED = 0, 1  # CU_MULTICAST_GRANULARITY_...
GRANULARITIES = {MINIMUM: 64 << 10, RECOMMENDED: 16 << 20}  # what the driver says of each; as far apart as on an H100
GRANULARITY = GRANULARITIES[MINIMUM]
LEAST_ALIGNMENT = 4 << 10  # of an address that is reserved without a wish
# The calls of the phases that a rank goes through, in order; those of the first rank and of the others differ.
OPENING = ("cuMulticastGetGranularity", "cuMulticastCreate", "cuMemExportToShareableHandle")
OPENING += ("cuMemImportFromShareableHandle", "cuMulticastAddDevice", "cuMemCreate", "cuMulticastBindMem")
OPENING += ("cuMemAddressReserve", "cuMemMap", "cuMemSetAccess")
PROOF = ("cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2")


class _Object:
    """What all handles of a multicast object mean. ``handles``: open ones, of all ranks; ``had``: ever."""

    def __init__(self, devices: int, size: int) -> None:
        self.devices, self.size, self.handles, self.had = devices, size, 0, 0
        self.members: set[int] = set()
        self.bound: dict[int, int] = {}  # rank -> address of its memory


class Switch:
    """What the drivers of all ranks share.

    Attributes:
        calls: ``(rank, call)``, as they came.
        broken: rules that a caller has broken.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.calls: list[tuple[int, str]] = []
        self.broken: list[str] = []
        self.objects: dict[tuple[int, int], _Object] = {}  # what an exported file means
        self.buffers: dict[int, ctypes.Array[ctypes.c_ubyte]] = {}
        self.unreached: set[int] = set()  # ranks whose memory a store to all does not reach
        self.made = 0  # objects
        self.granularities = dict(GRANULARITIES)


class FakeMulticast:
    """The driver of one rank. ``misbehave``: called with the name of each call before it; what it returns, if it is not
    SUCCESS, is what the call returns. ``names``: the entry points that there are."""

    def __init__(
        self,
        switch: Switch,
        rank: int,
        misbehave: Callable[[str], int] = lambda _name: SUCCESS,
        *,
        supported: bool = True,
        names: Sequence[str] | None = None,
    ) -> None:
        self._switch, self._rank, self._misbehave, self._supported = switch, rank, misbehave, supported
        self._names = multicast_driver.entry_names({}) if names is None else tuple(names)
        self._handles: dict[int, _Object | int] = {}  # an object, or the address of memory
        self._reserved: dict[int, int] = {}
        self._aligned: dict[int, int] = {}  # what a reserved address was asked to be a multiple of
        self._mapped: dict[int, _Object | int] = {}
        self._contexts = 0
        self._next = 1000 * (rank + 1)

    def __getattr__(self, name: str) -> Any:
        call = getattr(type(self), f"_{name}", None)
        if call is None or name not in self._names:
            raise AttributeError(name)

        def checked(*arguments: Any) -> int:
            if name != "cuGetErrorName":
                with self._switch.lock:
                    self._switch.calls.append((self._rank, name))
                if (status := self._misbehave(name)) != SUCCESS:
                    return status
            with self._switch.lock:
                return int(call(self, *arguments))

        return checked

    def left(self) -> dict[str, int]:
        """What has not been let go of."""
        return {
            "handles": len(self._handles),
            "reserved": len(self._reserved),
            "mapped": len(self._mapped),
            "contexts": self._contexts,
        }

    def _refuse(self, rule: str) -> int:
        self._switch.broken.append(f"rank {self._rank}: {rule}")
        return INVALID_VALUE

    def _new_handle(self, meaning: _Object | int) -> int:
        self._next += 1
        self._handles[self._next] = meaning
        if isinstance(meaning, _Object):
            meaning.handles += 1
            meaning.had += 1
        return self._next

    # -- the calls -----------------------------------------------------------------------------------------------------

    def _cuInit(self, _flags: Any) -> int:
        return SUCCESS

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

    def _cuCtxSetCurrent(self, _context: Any) -> int:
        return SUCCESS

    def _cuCtxSynchronize(self) -> int:
        return SUCCESS

    def _cuGetErrorName(self, status: Any, text: Any) -> int:
        name = NAMES.get(status.value)
        target(text).value = name
        return SUCCESS if name else INVALID_VALUE

    def _cuDeviceGetAttribute(self, value: Any, attribute: Any, _device: Any) -> int:
        if attribute.value != MULTICAST_SUPPORTED:
            return INVALID_VALUE
        target(value).value = int(self._supported)
        return SUCCESS

    def _cuMemGetAllocationGranularity(self, granularity: Any, _properties: Any, _option: Any) -> int:
        target(granularity).value = self._switch.granularities[MINIMUM] // 4
        return SUCCESS

    def _cuMulticastGetGranularity(self, granularity: Any, properties: Any, option: Any) -> int:
        if target(properties).devices < 2:
            return self._refuse("an object over fewer than two GPUs")
        target(granularity).value = self._switch.granularities[option.value]
        return SUCCESS

    def _cuMulticastCreate(self, handle: Any, properties: Any) -> int:
        wanted = target(properties)
        if wanted.size % self._switch.granularities[MINIMUM]:
            return self._refuse("an object of a size that is no multiple of the granularity")
        self._switch.made += 1
        target(handle).value = self._new_handle(_Object(wanted.devices, wanted.size))
        return SUCCESS

    def _cuMemExportToShareableHandle(self, file: Any, handle: Any, _kind: Any, _flags: Any) -> int:
        meaning = self._handles.get(handle.value)
        if not isinstance(meaning, _Object):
            return INVALID_HANDLE
        with tempfile.TemporaryFile() as made:
            copy = os.dup(made.fileno())
        state = os.fstat(copy)
        self._switch.objects[state.st_dev, state.st_ino] = meaning
        target(file).value = copy
        return SUCCESS

    def _cuMemImportFromShareableHandle(self, handle: Any, file: Any, _kind: Any) -> int:
        state = os.fstat(file.value)
        meaning = self._switch.objects.get((state.st_dev, state.st_ino))
        if meaning is None or meaning.handles == 0:  # it has gone with the first rank's handle
            return INVALID_HANDLE
        target(handle).value = self._new_handle(meaning)
        return SUCCESS

    def _cuMulticastAddDevice(self, handle: Any, _device: Any) -> int:
        meaning = self._handles.get(handle.value)
        if not isinstance(meaning, _Object):
            return INVALID_HANDLE
        if meaning.had < meaning.devices:
            return self._refuse("a GPU is added before all ranks have the object")
        meaning.members.add(self._rank)
        return SUCCESS

    def _cuMemCreate(self, handle: Any, size: Any, _properties: Any, _flags: Any) -> int:
        buffer = (ctypes.c_ubyte * size.value)()
        address = ctypes.addressof(buffer)
        self._switch.buffers[address] = buffer
        target(handle).value = self._new_handle(address)
        return SUCCESS

    def _cuMulticastBindMem(self, handle: Any, _at: Any, memory: Any, _from: Any, size: Any, _flags: Any) -> int:
        meaning, address = self._handles.get(handle.value), self._handles.get(memory.value)
        if not isinstance(meaning, _Object) or not isinstance(address, int):
            return INVALID_HANDLE
        if len(meaning.members) < meaning.devices:
            return self._refuse("memory is bound before all GPUs are part of the object")
        if size.value != meaning.size:
            return self._refuse("memory of another size than the object is bound")
        meaning.bound[self._rank] = address
        return SUCCESS

    def _cuMulticastUnbind(self, handle: Any, _device: Any, _at: Any, _size: Any) -> int:
        meaning = self._handles.get(handle.value)
        if not isinstance(meaning, _Object) or self._rank not in meaning.bound:
            return INVALID_HANDLE
        if meaning in self._mapped.values():
            return self._refuse("memory is unbound while the object is mapped")
        del meaning.bound[self._rank]
        return SUCCESS

    def _cuMemRelease(self, handle: Any) -> int:
        meaning = self._handles.pop(handle.value, None)
        if meaning is None:
            return INVALID_HANDLE
        if isinstance(meaning, _Object):
            meaning.handles -= 1
            if self._rank in meaning.bound:
                return self._refuse("an object goes while memory is bound to it")
            return SUCCESS
        if any(meaning in each.bound.values() for each in self._switch.objects.values()):
            return self._refuse("memory goes while it is bound")
        if meaning in self._mapped.values():
            return self._refuse("memory goes while it is mapped")
        del self._switch.buffers[meaning]
        return SUCCESS

    def _cuMemAddressReserve(self, address: Any, size: Any, alignment: Any, _wanted: Any, _flags: Any) -> int:
        self._next += 1
        start = (self._next << 32) + (0 if alignment.value else LEAST_ALIGNMENT)
        target(address).value = start
        self._reserved[start] = size.value
        self._aligned[start] = alignment.value or LEAST_ALIGNMENT
        return SUCCESS

    def _cuMemAddressFree(self, address: Any, _size: Any) -> int:
        return INVALID_VALUE if self._reserved.pop(address.value, None) is None else SUCCESS

    def _cuMemMap(self, address: Any, _size: Any, _offset: Any, handle: Any, _flags: Any) -> int:
        meaning = self._handles.get(handle.value)
        if meaning is None or address.value not in self._reserved:
            return INVALID_HANDLE
        if isinstance(meaning, _Object) and self._aligned[address.value] % self._switch.granularities[MINIMUM]:
            return self._refuse("an object is mapped at an address that is no multiple of the granularity")
        if isinstance(meaning, _Object) and self._rank not in meaning.bound:
            return self._refuse("an object is mapped before memory is bound to it")
        self._mapped[address.value] = meaning
        return SUCCESS

    def _cuMemUnmap(self, address: Any, _size: Any) -> int:
        return INVALID_VALUE if self._mapped.pop(address.value, None) is None else SUCCESS

    def _cuMemSetAccess(self, address: Any, _size: Any, _access: Any, _count: Any) -> int:
        return SUCCESS if address.value in self._mapped else INVALID_VALUE

    def _find(self, address: int) -> tuple[_Object | int, int]:
        """What is mapped there, and how far into it."""
        start = max(base for base in self._mapped if base <= address)
        return self._mapped[start], address - start

    def _cuMemcpyHtoD_v2(self, to: Any, data: Any, size: Any) -> int:
        meaning, at = self._find(to.value)
        own = [meaning] if isinstance(meaning, int) else [
            address for rank, address in meaning.bound.items() if rank not in self._switch.unreached
        ]  # fmt: skip
        for address in own:
            ctypes.memmove(address + at, data, size.value)
        return SUCCESS

    def _cuMemcpyDtoH_v2(self, data: Any, source: Any, size: Any) -> int:
        meaning, at = self._find(source.value)
        if not isinstance(meaning, int):
            return self._refuse("a load from the object, which kernels do only to sum")
        ctypes.memmove(data, meaning + at, size.value)
        return SUCCESS
