"""Memory that ranks share: every way to pass it on works, none leaves anything, and what cannot be is said before."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from llm_allreduce_plugin import TransportError
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.group.cards import host_identity
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.transport import nameless, passing
from llm_allreduce_plugin.transport.passing import ThroughFolder, ThroughProc, ThroughSocket, Way, remove_stale
from llm_allreduce_plugin.transport.shm import ShmMemory
from tests.conftest import PoolFor
from tests.support import forked

WAYS = {"proc": ThroughProc, "socket": ThroughSocket, "folder": ThroughFolder}
BYTES = 3 * 4096


def _blocked(_way: Way, _offer: object) -> int:
    raise OSError(errno.EACCES, "Permission denied")


def _by(context: RankContext, name: str, blocked: list[str], on_rank: int) -> None:
    """Share memory by one way, or by those that are left; write, read, and find nothing afterwards."""
    before = forked.open_files()
    patches = [mock.patch.object(WAYS[way], "_receive", _blocked) for way in blocked if context.rank == on_rank]
    for patch in patches:
        patch.start()
    ways = [WAYS[name]()] if name else None
    memory = ShmMemory.open(Agreement(context.group, 20.0), BYTES, ways=ways)
    for patch in patches:
        patch.stop()
    rank, world_size = context.rank, context.world_size
    assert len(memory.buffer) >= BYTES * world_size
    assert memory.bases == [memory.address + BYTES * peer for peer in range(world_size)]
    zeros = not any(memory.buffer[: BYTES * world_size])
    assert all(context.gather(zeros))
    memory.buffer[rank * BYTES : (rank + 1) * BYTES] = bytes([rank + 1]) * BYTES
    context.gather(None)
    assert memory.buffer[: BYTES * world_size] == b"".join(bytes([peer + 1]) * BYTES for peer in range(world_size))
    files = {line.split(" ", 1)[0]: line for line in forked.open_files() - before}
    assert len(files) <= 1, files  # the mapping's own
    for number in files:
        assert stat.S_IMODE(os.fstat(int(number)).st_mode) == 0o600
    assert forked.left_in_shm() == []
    memory.close()
    assert forked.open_files() - before == set()
    assert "llm-allreduce" not in Path("/proc/self/maps").read_text()
    context.gather(None)


@pytest.mark.parametrize("name", WAYS)
def test_every_way(cpu_pool: PoolFor, name: str) -> None:
    cpu_pool(3).run(_by, name, [], 0)


@pytest.mark.parametrize("blocked", (["proc"], ["proc", "socket"]), ids="+".join)
def test_a_way_that_one_rank_cannot_go_is_gone_by_none(cpu_pool: PoolFor, blocked: list[str]) -> None:
    cpu_pool(3).run(_by, "", blocked, 2)


def _no_way(context: RankContext) -> tuple[str, list[str]]:
    with (
        mock.patch.multiple(ThroughProc, _receive=_blocked),
        mock.patch.multiple(ThroughSocket, _receive=_blocked),
        mock.patch.multiple(ThroughFolder, _receive=_blocked),
        pytest.raises(TransportError) as caught,
    ):
        ShmMemory.open(Agreement(context.group, 20.0), BYTES)
    context.gather(None)
    return str(caught.value), forked.left_in_shm()


def test_where_no_way_is_left_all_ranks_hear_why(cpu_pool: PoolFor) -> None:
    first, *others = cpu_pool(3).run(_no_way)
    assert others == [first, first]
    text, left = first
    assert left == []
    assert re.fullmatch(
        r"rank 1 cannot open the file of rank 0 through /proc: Permission denied; rank 1 cannot get .* through a "
        r"socket: Permission denied; rank 1 cannot open .* in /dev/shm: Permission denied \(.*--ipc=host\)",
        text,
    )


def _other_file(context: RankContext) -> str:
    """What rank 0's number says in another PID namespace: some other file."""

    def serve(_way: Way, _descriptor: int) -> tuple[str, bytes]:
        return "/dev/zero", b""

    with mock.patch.object(ThroughProc, "_serve", serve), pytest.raises(TransportError) as caught:
        ShmMemory.open(Agreement(context.group, 20.0), BYTES, ways=[ThroughProc()])
    return str(caught.value)


def test_another_file_is_not_taken(cpu_pool: PoolFor) -> None:
    for text in cpu_pool(2).run(_other_file):
        assert text.startswith("rank 1 cannot open the file of rank 0 through /proc: finds another file there")


def test_a_socket_gives_nothing_to_strangers() -> None:
    way = ThroughSocket()
    descriptor = way.create(4096)
    offer = way.offer(descriptor)
    stranger = passing.Offer(offer.device, offer.inode, offer.nonce, offer.where, b"x" * 32)
    with pytest.raises(OSError, match="was sent nothing"):
        ThroughSocket().receive(stranger)
    os.close(ThroughSocket().receive(offer))
    way.withdraw()
    with pytest.raises(ConnectionRefusedError):
        ThroughSocket().receive(offer)
    os.close(descriptor)
    assert forked.wait_until(lambda: forked.left_in_shm() == [])


def test_names_that_a_kill_has_left_are_taken_away_by_the_next() -> None:
    code = (
        "import os, time; from llm_allreduce_plugin.transport.passing import ThroughFolder; way = ThroughFolder(); "
        "descriptor = way.create(4096); print(way.offer(descriptor).where, flush=True); time.sleep(60)"
    )
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    path = nameless.SHM_FOLDER / maker.stdout.readline().strip()
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        remove_stale()
        assert path.exists(), "its maker still wants it"
        maker.kill()
        maker.wait()
        assert path.exists(), "there is no way to avoid it here"
        remove_stale()
        assert not path.exists()
    finally:
        maker.kill()
        maker.communicate()
        path.unlink(missing_ok=True)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_the_size_of_a_file_is_fixed() -> None:
    descriptor = nameless.create(8192)
    try:
        for size in (4096, 16384):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        nameless.reserve(descriptor, 4096, 4096)
    finally:
        os.close(descriptor)


def test_memory_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"only \d+ bytes of memory are available") as caught:
        nameless.create(1 << 50)
    assert caught.value.errno == errno.ENOMEM
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:     50 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert nameless.available_bytes(tmp_path / "meminfo", tmp_path) == 50 << 10
    (tmp_path / "memory.max").write_text("40000\n")
    (tmp_path / "memory.current").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 9000\nfile 12000\nshmem 2000\n")
    assert nameless.available_bytes(tmp_path / "meminfo", tmp_path) == 20000, "what files take can be dropped"
    assert nameless.available_bytes(tmp_path / "none", tmp_path / "none") is None
    old = tmp_path / "version 1"
    (old / "memory").mkdir(parents=True)
    (old / "memory" / "memory.limit_in_bytes").write_text("40000\n")
    (old / "memory" / "memory.usage_in_bytes").write_text("30000\n")
    (old / "memory" / "memory.stat").write_text("cache 12000\nrss 9000\nshmem 2000\n")
    assert nameless.available_bytes(tmp_path / "none", old) == 20000
    (old / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert nameless.available_bytes(tmp_path / "none", old) is None, "what version 1 says where there is no limit"


def test_a_full_folder_is_an_error_before(cpu_pool: PoolFor) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(os, "posix_fallocate", full), pytest.raises(OSError, match="No space left"):
        nameless.reserve(0, 0, 1)
    for text in cpu_pool(2).run(_too_much):
        assert re.fullmatch(r"rank 1 cannot map \d+ bytes of shared memory: \[Errno 28\] No space left on device", text)


def _too_much(context: RankContext) -> str:
    def full(*_: object) -> None:
        if context.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(os, "posix_fallocate", full), pytest.raises(TransportError) as caught:
        ShmMemory.open(Agreement(context.group, 20.0), BYTES)
    return str(caught.value)


# -- clean-up that fails -----------------------------------------------------------------------------------------------


def _clean_up_fails(context: RankContext) -> tuple[str, str]:
    """On rank 0 alone, every step of the clean-up fails: the error is still that of all."""
    way = ThroughFolder()

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    withdraw = fails if context.rank == 0 else ThroughFolder.withdraw
    with (
        mock.patch.multiple(ThroughFolder, _receive=_blocked, withdraw=withdraw),
        pytest.raises(TransportError) as caught,
    ):
        ShmMemory.open(Agreement(context.group, 20.0), BYTES, ways=[way])
    way.withdraw()
    context.gather(None)
    return type(caught.value).__name__, str(caught.value)


def test_a_failing_clean_up_hides_nothing(cpu_pool: PoolFor) -> None:
    first, second = cpu_pool(2).run(_clean_up_fails)
    assert first == second
    assert first[1].startswith("rank 1 cannot open the file of rank 0 in /dev/shm: Permission denied")


# -- containers --------------------------------------------------------------------------------------------------------


def test_one_kernel_is_one_host(tmp_path: Path) -> None:
    (tmp_path / "boot_id").write_text("one\n")
    with mock.patch("socket.gethostname", side_effect=["container-a", "container-b"] * 2):
        assert host_identity(tmp_path / "boot_id") == host_identity(tmp_path / "boot_id") == "one"
        assert host_identity(tmp_path / "none") != host_identity(tmp_path / "none")


_RANK = """
import sys, socket
import torch, torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # a group that has nothing but its store
from llm_allreduce_plugin import AllReduceConfig, TensorParallelCommunicator
rank, folder, host = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if rank:
    socket.sethostname(host)
store = dist.FileStore(folder + "/store", 2)
dist.init_process_group("fake", store=store, rank=rank, world_size=2)
config = AllReduceConfig(allreduce_strategy="ONESHOT", timeout_s=20, start_timeout_s=60, tuning_profile="none")
group = TensorParallelCommunicator(dist.group.WORLD, torch.device("cpu"), config)
print(group.facts.transport, "|", group.facts.no_transport_reason)
if group.facts.no_transport_reason == "":
    assert torch.equal(group.all_reduce(torch.full((100,), rank + 1.0)), torch.full((100,), 3.0))
group.close()
"""


def _in_container(number: int, folder: Path, namespaces: list[str], prepare: str) -> subprocess.Popen[str]:
    rank = [sys.executable, "-c", _RANK, str(number), str(folder), "container-b"]
    command = ["unshare", *namespaces, "--fork", "sh", "-c", f'{prepare} exec "$@"', "sh", *rank] if number else rank
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _can_unshare() -> bool:
    everything = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--net", "--fork", "true"]
    try:
        return subprocess.run(everything, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not _can_unshare(), reason="needs rights to make namespaces")
@pytest.mark.parametrize(
    ("namespaces", "prepare", "transport", "reason"),
    [
        # A pod's containers share the network; --ipc=host shares the folder; without either nothing is shared.
        (["--mount", "--uts", "--ipc", "--pid"], "mount -t tmpfs none /dev/shm;", "shm", ""),
        (["--mount", "--uts", "--pid", "--net"], "", "shm", ""),
        (
            ["--mount", "--uts", "--ipc", "--pid", "--net"],
            "mount -t tmpfs none /dev/shm;",
            "none",
            "rank 1 cannot open the file of rank 0 through /proc",
        ),
    ],
    ids=("pod", "ipc=host", "apart"),
)
def test_containers_of_one_machine(
    tmp_path: Path, namespaces: list[str], prepare: str, transport: str, reason: str
) -> None:
    ranks = [
        _in_container(number, tmp_path, namespaces, f"mount --make-rprivate /; mount -t proc none /proc; {prepare}")
        for number in (0, 1)
    ]
    try:
        for rank in ranks:
            output, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
            said, why = (part.strip() for part in output.split("|"))
            assert said == transport, why
            assert why.startswith(reason)
            assert ("--ipc=host" in why) == bool(reason)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert forked.left_in_shm() == []


def _share_and_die(context: RankContext, way: str) -> None:
    while True:
        memory = ShmMemory.open(Agreement(context.group, 0.3), BYTES, ways=[WAYS[way]()])
        memory.close()


@pytest.mark.parametrize("way", ("proc", "socket"))
def test_kills_while_memory_is_shared_leave_nothing(way: str) -> None:
    """Of all ranks at once, and so of each at any moment."""
    attacks = int(os.environ.get("ALLREDUCE_TEST_ATTACKS", "5"))
    for _ in range(attacks):
        with forked.forked(2, _share_and_die, way) as ranks:
            time.sleep(0.05 + random.uniform(0, 0.075))
            for rank in (0, 1):
                ranks.send(rank, signal.SIGKILL)
        assert forked.left_in_shm(ranks.pids) == []
