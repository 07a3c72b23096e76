"""What ranks of equal place on their hosts exchange sums through: a process group of torch, which only moves bytes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import AllgatherOptions, Backend, PrefixStore, Store

from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.base.attempt import Attempt
from llm_allreduce_plugin.base.cleanup import keep_for_ever, quietly
from llm_allreduce_plugin.base.step import store_of
from llm_allreduce_plugin.errors import TransportError

_SLICE_S = 0.2  # of a wait on a CPU rank, between looks at what else there is
_ABORT_S = 5.0
# torch ends the process of a collective that takes longer. Here the watch between hosts names who is missing, before.
_NCCL_TIMEOUT = timedelta(days=1)
# It would also end the process, and those of all other ranks, as soon as NCCL says that the other side has closed its
# connection, or CUDA that a kernel has given up its wait, and hold the host where a wait is for the stream. Read when a
# process group is made, by this one only.
_LEFT_TO_THE_WATCH = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
}


class Rail:
    """A process group of its own, over NCCL on GPUs and over gloo on CPU ranks.

    Made with the group's store and known to nobody else: no other rank need take part, and torch's default group does
    not hold it.
    """

    def __init__(self, backend: Backend, device: torch.device, hosts: int) -> None:
        self._backend: Backend | None = backend
        self._on_gpu = device.type == "cuda"
        self.hosts = hosts

    @classmethod
    def open(
        cls, agreement: Agreement, group: dist.ProcessGroup, device: torch.device, rail: Sequence[int], name: str
    ) -> Rail:
        """Connect, and prove it by an exchange. Collective over all ranks of ``agreement``.

        Args:
            agreement: of the whole group.
            group: whose store ranks find each other by.
            device: this rank's.
            rail: the ranks that exchange sums, in the order of their hosts.
            name: of this group, unlike any other's; the same on every rank.

        Raises:
            TransportError: on every rank alike, when one cannot.
        """
        index = list(rail).index(agreement.rank)
        prefix = f"llm_allreduce/{name}/rail/{rail[0]}"

        def make() -> Rail:
            store = PrefixStore(prefix, store_of(group))
            made = cls(_backend(store, index, len(rail), device, agreement.wait_s), device, len(rail))
            made._prove(index, device, agreement.wait_s)
            return made

        return agreement.on_every_rank(
            make, "to connect their hosts", TransportError, "cannot exchange sums with other hosts", may_block=True
        )

    def _prove(self, index: int, device: torch.device, wait_s: float) -> None:
        """Each sends its number. NCCL makes its connections here, and none while a graph is captured."""
        mine = torch.full((8,), float(index), device=device)
        found = torch.empty(8 * self.hosts, device=device)
        self.wait(self.start(found, mine, wait_s), wait_s)
        if found[::8].tolist() != [float(host) for host in range(self.hosts)]:
            message = f"got the numbers {found[::8].tolist()} from hosts 0 to {self.hosts - 1}"
            raise TransportError(message)

    def start(self, gathered: torch.Tensor, mine: torch.Tensor, timeout_s: float) -> dist.Work:
        """Begin to gather ``mine`` of every host, in their order, into ``gathered``. Collective over the rail.

        Raises:
            RuntimeError: the other side is gone, or this has been closed.
        """
        if self._backend is None:
            message = "the connection between hosts is closed"
            raise RuntimeError(message)
        options = AllgatherOptions()
        if not self._on_gpu:
            options.timeout = timedelta(seconds=timeout_s)
        # Backends have no other; torch's stubs do not know it.
        work: dist.Work = self._backend._allgather_base(gathered, mine, options)  # type: ignore[attr-defined]  # noqa: SLF001
        return work

    def wait(self, work: dist.Work, timeout_s: float, look: Callable[[], None] = lambda: None) -> None:
        """On a GPU, let the current stream wait for the exchange, and return; on a CPU rank, wait for it.

        ``look``: asked now and then meanwhile; what it raises ends the wait.

        Raises:
            RuntimeError: it has failed, or is not done after ``timeout_s``.
        """
        if self._on_gpu:
            work.wait()
            return
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                work.wait(timedelta(seconds=_SLICE_S))
            except RuntimeError:
                if work.is_completed():  # it may have ended just after the slice had
                    work.wait()  # which raises why, if it has failed
                    return
                if time.monotonic() >= deadline:
                    raise
                look()
            else:
                return

    def abort(self) -> None:
        """Let go of exchanges that will not end. What they were to bring must not be used."""
        backend, self._backend = self._backend, None
        if backend is None:
            return
        # Its destructor waits for exchanges under way, for which nobody may be there any more.
        keep_for_ever(backend)
        if self._on_gpu:
            Attempt(lambda: quietly(backend.abort, "abort an exchange between hosts"), "abort").wait(_ABORT_S)

    def close(self) -> None:
        """Let go of it, when no exchange is under way."""
        backend, self._backend = self._backend, None
        if backend is not None and self._on_gpu:
            Attempt(lambda: quietly(backend.abort, "end the connection between hosts"), "abort").wait(_ABORT_S)


def _backend(store: Store, index: int, size: int, device: torch.device, wait_s: float) -> Backend:
    if device.type == "cuda":
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = _NCCL_TIMEOUT  # noqa: SLF001  (as torch sets it)
        options.is_high_priority_stream = True  # small exchanges are latency
        with torch.cuda.device(device), _environment(_LEFT_TO_THE_WATCH):
            return c10d.ProcessGroupNCCL(store, index, size, options)
    return c10d.ProcessGroupGloo(store, index, size, timedelta(seconds=wait_s))


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
