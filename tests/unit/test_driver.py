"""The driver's calls for memory of an NVLink domain: what is passed, what is undone, and how errors read."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport import driver as drivers
from llm_allreduce_plugin.transport.driver import FABRIC_HANDLE_BYTES, Access, Driver, DriverError, Properties
from llm_allreduce_plugin.transport.mapped import Mapped, MappedMemory, Segment, let_go_of_dropped
from tests.support.fake_fabric import GRANULARITY, UNKNOWN, FakeEntryPoints, Truth


def failing(call: str, count: int = 1) -> Any:
    """Misbehaviour: that call returns an error, the ``count``-th time."""
    seen = 0

    def misbehave(name: str) -> int:
        nonlocal seen
        seen += name == call
        return UNKNOWN if name == call and seen == count else 0

    return misbehave


def test_structures_are_those_of_cuda_h() -> None:
    """On 64-bit machines: CUmemAllocationProp is 32 bytes, CUmemAccessDesc 12."""
    offsets = {name: getattr(Properties, name).offset for name, _ in Properties._fields_}
    assert offsets == {"type": 0, "handle_types": 4, "location": 8, "win32_meta_data": 16, "flags": 24}
    assert (ctypes.sizeof(Properties), ctypes.sizeof(Access)) == (32, 12)


def test_memory_goes_from_one_process_to_another() -> None:
    here, there = FakeEntryPoints(Truth()), FakeEntryPoints(Truth())
    one, other = Driver(0, here), Driver(1, there)
    assert one.has_fabric_handles
    size = one.rounded(100)
    assert size == GRANULARITY
    handle = one.create(size)
    address = one.map(handle, size)
    one.write(address, b"over\0there")
    exported = one.export(handle)
    assert len(exported) == FABRIC_HANDLE_BYTES
    taken = other.take(exported)
    seen = other.map(taken, size)
    assert seen != address
    assert other.read(seen, 10) == b"over\0there"
    other.write(seen + size - 4, b"back")
    assert one.read(address + size - 4, 4) == b"back"
    one.unmap(address, size)
    one.release(handle)
    assert other.read(seen, 4) == b"over", "lives until its last mapping ends"
    other.unmap(seen, size)
    other.release(taken)
    for each in (one, other):
        each.close()
        each.close()
    here.end()
    assert set(here.left().values()) == set(there.left().values()) == {0}


@pytest.mark.parametrize("call", ("cuMemMap", "cuMemSetAccess"))
def test_what_cannot_be_mapped_leaves_no_address_behind(call: str) -> None:
    entry_points = FakeEntryPoints(Truth(), failing(call))
    driver = Driver(0, entry_points)
    handle = driver.create(GRANULARITY)
    with pytest.raises(DriverError, match=rf"^{call}: CUDA_ERROR_UNKNOWN \(999\)$"):
        driver.map(handle, GRANULARITY)
    assert entry_points.left() == {"handles": 1, "reserved": 0, "mapped": 0, "contexts": 1}


def test_errors_name_the_call() -> None:
    with pytest.raises(DriverError, match=r"^cuInit: CUDA_ERROR_UNKNOWN \(999\)$"):
        Driver(0, FakeEntryPoints(Truth(), failing("cuInit")))
    lost = FakeEntryPoints(Truth(), lambda name: 12345 if name == "cuMemCreate" else 0)
    with pytest.raises(DriverError, match=r"^cuMemCreate: CUDA error 12345$"):
        Driver(0, lost).create(GRANULARITY)


def test_a_driver_that_is_too_old_says_so() -> None:
    class Old(FakeEntryPoints):
        def __getattr__(self, name: str) -> Any:
            if name == "cuMemExportToShareableHandle":
                raise AttributeError(name)
            return super().__getattr__(name)

    driver = Driver(0, Old(Truth()))
    handle = driver.create(GRANULARITY)
    with pytest.raises(DriverError, match="the CUDA driver has no cuMemExportToShareableHandle: it is too old"):
        driver.export(handle)


def test_a_driver_that_does_not_know_the_question_has_no_fabric_handles() -> None:
    assert not Driver(0, FakeEntryPoints(Truth(), failing("cuDeviceGetAttribute"))).has_fabric_handles
    assert not Driver(0, FakeEntryPoints(Truth(handles=False))).has_fabric_handles


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_name: str) -> None:
        message = "libcuda.so.1: cannot open shared object file"
        raise OSError(message)

    monkeypatch.setattr(drivers.ctypes, "CDLL", none)
    with pytest.raises(DriverError, match="there is no CUDA driver: libcuda"):
        Driver(0)


def test_memory_that_is_still_in_use_ends_with_its_last_user() -> None:
    """A step that ranks have given up may be on its way still: what it makes is let go of where it ends."""
    entry_points = FakeEntryPoints(Truth())
    mapped = Mapped()
    with mapped.in_use():
        with mapped.in_use():
            mapped.driver = Driver(0, entry_points)
            mapped.close()
            mapped.close()
        segment = Segment(mapped.driver, mapped.driver.create(GRANULARITY), GRANULARITY)
        mapped.segments.append(segment)
        segment.map()
        assert entry_points.left() == {"handles": 1, "reserved": 1, "mapped": 1, "contexts": 1}
    assert set(entry_points.left().values()) == {0}
    with pytest.raises(RuntimeError, match="given up before"), mapped.in_use():
        pass


def test_memory_that_nothing_uses_ends_at_once_and_once() -> None:
    entry_points = FakeEntryPoints(Truth())
    mapped = Mapped()
    with mapped.in_use():
        mapped.driver = Driver(0, entry_points)
    assert entry_points.left()["contexts"] == 1
    mapped.close()
    mapped.close()
    assert entry_points.left()["contexts"] == 0


class Gpu:
    """What torch says of a GPU, one stream of which may be captured: then nobody may wait for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures, self.waits = False, 0
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.captures)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def wait(self, device: torch.device) -> None:
        assert device == torch.device("cuda", 0)
        assert not self.captures, "this would end the capture"
        self.waits += 1


def memory_of_a_gpu(entry_points: FakeEntryPoints) -> MappedMemory:
    """As it is once it has been opened, by one rank."""
    whole = Mapped()
    whole.driver = Driver(0, entry_points)
    segment = Segment(whole.driver, whole.driver.create(GRANULARITY), GRANULARITY)
    whole.segments.append(segment)
    segment.map()
    own: Any = mock.Mock(device=torch.device("cuda", 0))
    return MappedMemory(whole, own, Transport.SYMMETRIC)


def test_memory_that_is_dropped_is_let_go_of_once_nothing_can_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, entry_points = Gpu(monkeypatch), FakeEntryPoints(Truth())
    memory = memory_of_a_gpu(entry_points)
    del memory
    gc.collect()
    assert gpu.waits == 1
    assert set(entry_points.left().values()) == {0}


def test_memory_that_is_dropped_in_a_capture_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until somebody asks: CUDA forbids to wait for a GPU meanwhile, and a wait would end the capture."""
    gpu, entry_points = Gpu(monkeypatch), FakeEntryPoints(Truth())
    memories = [memory_of_a_gpu(entry_points), memory_of_a_gpu(entry_points)]
    gpu.captures = True
    with mock.patch.object(sys, "unraisablehook") as raised:
        memories.clear()
        gc.collect()
    assert raised.call_args_list == []
    assert gpu.waits == 0
    assert entry_points.left()["mapped"] == 2
    gpu.captures = False
    let_go_of_dropped()
    assert gpu.waits == 2
    assert set(entry_points.left().values()) == {0}
    let_go_of_dropped()
    assert gpu.waits == 2


def test_memory_that_was_dropped_in_a_capture_goes_where_a_context_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, entry_points = Gpu(monkeypatch), FakeEntryPoints(Truth())
    memory = memory_of_a_gpu(entry_points)
    gpu.captures = True
    del memory
    gc.collect()

    def fails(_device: torch.device) -> None:
        message = "CUDA error: unspecified launch failure"
        raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    let_go_of_dropped()
    assert set(entry_points.left().values()) == {0}


def test_nothing_asks_for_multicast() -> None:
    """Every entry point that is looked up in a whole use of it is one of the list, and none is of multicast."""
    asked: set[str] = set()
    entry_points = FakeEntryPoints(Truth(), lambda name: asked.add(name) or 0)
    driver = Driver(0, entry_points)
    _ = driver.has_fabric_handles
    size = driver.rounded(1)
    handle = driver.create(size)
    address = driver.map(handle, size)
    driver.take(driver.export(handle))
    driver.write(address, driver.read(address, 8))
    driver.unmap(address, size)
    driver.release(handle)
    driver.close()
    entry_points.end()
    listed = drivers.EntryPoints.__doc__ or ""
    assert {name for name in asked if name not in listed} == set()
    assert not [name for name in asked if "ulticast" in name]
