"""The driver's calls for memory of which one store reaches several GPUs: a table of its own, and often an empty one.

Where a user has switched multicast off for torch or NCCL, the table has no entry for it: such a call is not skipped,
it is impossible.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

from llm_allreduce_plugin.transport import driver
from llm_allreduce_plugin.transport.driver import FILE_DESCRIPTOR, Driver, EntryPoints

SWITCHES = (("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"), ("NCCL_NVLS_ENABLE", "0"))
MULTICAST_NAMES = (
    "cuMulticastGetGranularity",
    "cuMulticastCreate",
    "cuMulticastAddDevice",
    "cuMulticastBindMem",
    "cuMulticastUnbind",
)
MULTICAST_SUPPORTED = 132  # CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED
OUT_OF_MEMORY, ILLEGAL_STATE, NOT_READY = 2, 401, 802  # CUresult
# CU_MULTICAST_GRANULARITY_MINIMUM: all that cuda.h asks of what is created, bound and mapped. The recommended one is
# told to be 512 MiB on an H100 (not measured here), for 64 MiB that are used.
_MINIMUM = 0


class ObjectProperties(ctypes.Structure):
    """CUmulticastObjectProp."""

    _fields_ = (
        ("devices", ctypes.c_uint),
        ("size", ctypes.c_size_t),
        ("handle_types", ctypes.c_ulonglong),
        ("flags", ctypes.c_ulonglong),
    )


def switched_off_by(environment: Mapping[str, str] | None = None) -> str | None:
    """The variable by which multicast is switched off on this machine, as it is set, or None.

    ``environment``: instead of this process's.
    """
    variables = os.environ if environment is None else environment
    for name, off in SWITCHES:
        if variables.get(name, "").strip() == off:
            return f"{name}={off}"
    return None


def entry_names(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The entry points that a table may have."""
    return driver.NAMES if switched_off_by(environment) else driver.NAMES + MULTICAST_NAMES


def load(environment: Mapping[str, str] | None = None) -> EntryPoints:
    """The driver of this machine, with the calls for multicast unless they are switched off.

    Raises:
        DriverError: there is none.
    """
    return driver.load(entry_names(environment))


class MulticastDriver(Driver):
    """The memory of one GPU, and multicast objects that it is part of. See :class:`Driver`."""

    needed_for = "multicast, or multicast is switched off"

    def __init__(self, ordinal: int, entry_points: EntryPoints | None = None) -> None:
        super().__init__(ordinal, load() if entry_points is None else entry_points, FILE_DESCRIPTOR)

    @property
    def has_multicast(self) -> bool:
        """Whether this GPU can be part of such an object, by the driver's word.

        Raises:
            DriverError: the driver does not say.
        """
        value = ctypes.c_int()
        self._do("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(MULTICAST_SUPPORTED), self._device)
        return bool(value.value)

    def multicast_granularity(self, size: int, devices: int) -> int:
        """What sizes and addresses of an object over ``devices`` GPUs for ``size`` bytes must be multiples of.

        Raises:
            DriverError: the driver does not say.
        """
        granularity = ctypes.c_size_t()
        properties = ObjectProperties(devices, size, FILE_DESCRIPTOR, 0)
        self._bound(
            "cuMulticastGetGranularity",
            ctypes.byref(granularity),
            ctypes.byref(properties),
            ctypes.c_int(_MINIMUM),
        )
        return granularity.value

    def multicast_rounded(self, size: int, devices: int) -> int:
        """The bytes that an object over ``devices`` GPUs for ``size`` bytes takes, and that can be bound to it.

        Raises:
            DriverError: the driver does not say.
        """
        granularity = self.multicast_granularity(size, devices)
        return self.rounded(-(-size // granularity) * granularity)

    def create_multicast(self, size: int, devices: int) -> int:
        """A handle of a new object. ``size``: a multiple that :meth:`multicast_rounded` gives.

        Raises:
            DriverError: with the reason.
        """
        handle = ctypes.c_ulonglong()
        properties = ObjectProperties(devices, size, FILE_DESCRIPTOR, 0)
        self._bound("cuMulticastCreate", ctypes.byref(handle), ctypes.byref(properties))
        return handle.value

    def add_device(self, handle: int) -> None:
        """Make this GPU part of the object. Every GPU must be before anything is bound.

        Raises:
            DriverError: with the reason.
        """
        self._bound("cuMulticastAddDevice", ctypes.c_ulonglong(handle), self._device)

    def bind(self, handle: int, memory: int, size: int) -> None:
        """Let what is stored to the object arrive in this memory, too.

        Raises:
            DriverError: with the reason.
        """
        zero = ctypes.c_size_t(0)
        self._bound(
            "cuMulticastBindMem",
            ctypes.c_ulonglong(handle),
            zero,
            ctypes.c_ulonglong(memory),
            zero,
            ctypes.c_size_t(size),
            ctypes.c_ulonglong(0),
        )

    def unbind(self, handle: int, size: int) -> None:
        """The end of :meth:`bind`. The object must not be mapped here any more.

        Raises:
            DriverError: with the reason.
        """
        self._bound(
            "cuMulticastUnbind",
            ctypes.c_ulonglong(handle),
            self._device,
            ctypes.c_size_t(0),
            ctypes.c_size_t(size),
        )
