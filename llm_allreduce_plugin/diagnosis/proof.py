"""The proof that ranks reach each other: real processes write, read and sum real bytes.

In a session of processes of their own, which ends at a deadline whatever a broken link does to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Self

from llm_allreduce_plugin.algorithms.facts import SUPPORTED_WORLD_SIZES
from llm_allreduce_plugin.base import processes
from llm_allreduce_plugin.config import AllReduceConfig, TransportChoice
from llm_allreduce_plugin.diagnosis.finding import Finding, fail, ok, warn
from llm_allreduce_plugin.group.layouts import peer_refusal, transports
from llm_allreduce_plugin.topology import NodeTopology
from llm_allreduce_plugin.topology.links import Transport

TIMEOUT_S = 120.0  # torch is loaded, and eight ranks make contexts
WAIT_S = 10.0  # a rank for a peer
COUNTS = (1000, 300_007)  # elements: in one step and in two
DTYPE = "bfloat16"
_CHILD = """
import sys
from llm_allreduce_plugin.base.processes import end_with_parent
end_with_parent(int(sys.argv[1]))
from llm_allreduce_plugin.diagnosis.proof_child import main
main()
"""


@dataclasses.dataclass(frozen=True)
class Proof:
    """What became of it.

    Attributes:
        outcome: ``hung`` when it had not ended at the deadline.
        text: what was proved, or why not.
    """

    outcome: Literal["proved", "failed", "hung"]
    text: str


@dataclasses.dataclass(frozen=True)
class Task:
    """What to prove: that so many ranks reach each other in this way."""

    device: Literal["cuda", "cpu"]
    ranks: int
    transport: TransportChoice
    workspace_bytes: int | None = None


class _Child:
    """A session of processes that prove what they are asked to, with the same ranks.

    Args:
        command: what it runs; it is given the id of this process.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = os.fdopen(os.memfd_create("errors"), "w+b")
        self._process = subprocess.Popen(  # noqa: S603
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            bufsize=0,
        )
        self._forget = processes.at_last(self.end)
        self._rest = b""  # of a line that has come in part

    def ask(self, task: Task) -> None:
        """Let it prove something next."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it says is asked for all the same
            self._process.stdin.write(json.dumps(dataclasses.asdict(task)).encode() + b"\n")

    def lines(self, deadline: float) -> Iterator[dict[str, str | None]]:
        """What it says, until it ends.

        Raises:
            TimeoutError: nothing more has come by ``deadline``, of the monotonic clock.
        """
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                if not (data := os.read(self._process.stdout.fileno(), 1 << 16)):
                    return
                *whole, self._rest = (self._rest + data).split(b"\n")
                yield from _lines(whole)

    def last_words(self, deadline: float) -> str:
        """Of one that has said no more: the last line of its errors, or its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    def end(self) -> None:
        """All of its session, at once. What the kernel does not let go is left behind, not waited for."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._forget()

    def close(self) -> None:
        """End it, and let go of what leads to it."""
        self.end()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _lines(lines: Iterable[bytes]) -> Iterator[dict[str, str | None]]:
    for line in lines:
        with contextlib.suppress(ValueError):
            parsed = json.loads(line)
            if isinstance(parsed, dict):
                yield parsed


class Prover:
    """Proves one thing after another, with the same ranks as long as all is well.

    Args:
        timeout_s: for each of them.
        command: of the process that starts the ranks.
    """

    def __init__(
        self, *, timeout_s: float = TIMEOUT_S, command: Sequence[str] = (sys.executable, "-c", _CHILD)
    ) -> None:
        self._timeout_s = timeout_s
        self._command = command
        self._child: _Child | None = None
        self._ranks: tuple[str, int] | None = None  # device and number of those that there are

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """Let the process that starts the ranks load torch, which takes seconds, before it is known what to prove."""
        if self._child is None:
            self._child = _Child(self._command)

    def __call__(self, task: Task) -> Proof:
        """Prove it, within ``timeout_s`` seconds."""
        if self._ranks not in (None, (task.device, task.ranks)):
            self.close()
        self.begin()
        assert self._child is not None
        self._ranks = task.device, task.ranks
        proof = self._ask(self._child, task)
        if proof.outcome != "proved":
            self.close()  # whatever it was, these ranks may have been left in
        return proof

    def _ask(self, child: _Child, task: Task) -> Proof:
        began = time.monotonic()
        deadline, steps = began + self._timeout_s, ["none"]
        child.ask(task)
        try:
            for line in child.lines(deadline):
                if "step" in line:
                    steps.append(str(line["step"]))
                if "answer" in line:
                    if line["answer"] is not None:
                        return Proof("failed", line["answer"])
                    seconds = time.monotonic() - began
                    return Proof("proved", f"{task.ranks} ranks summed to the bit ({seconds:.1f} s)")
        except TimeoutError:
            return Proof("hung", f"no answer within {self._timeout_s:g} s; the last step was: {steps[-1]}")
        return Proof("failed", f"the ranks ended early: {child.last_words(deadline)}")

    def close(self) -> None:
        """End the ranks."""
        child, self._child, self._ranks = self._child, None, None
        if child is not None:
            child.close()


def run(task: Task, *, timeout_s: float = TIMEOUT_S, command: Sequence[str] = (sys.executable, "-c", _CHILD)) -> Proof:
    """Prove it alone, within ``timeout_s`` seconds."""
    with Prover(timeout_s=timeout_s, command=command) as prover:
        return prover(task)


Runner = Callable[[Task], Proof]


def largest_group(gpus: int) -> int:
    """Ranks that kernels exist for, on so many GPUs; 0 when there are too few."""
    return max((size for size in SUPPORTED_WORLD_SIZES if size <= gpus), default=0)


def findings(topology: NodeTopology, config: AllReduceConfig, runner: Runner) -> list[Finding]:
    """The proofs that this node and these settings call for."""
    size = None if config.workspace_bytes is None else int(config.workspace_bytes)
    if not topology.gpus:
        return [_cpu(runner(Task("cpu", 2, TransportChoice.AUTO, size)))]
    ranks = largest_group(len(topology.gpus))
    if not ranks:
        return [ok("proof", "one GPU: no peer to prove anything with")]
    found = []
    peer: Proof | None = None
    through_peers = Transport.SYMMETRIC in transports(config, "cuda", peer_refusal())
    if through_peers and topology.p2p_fault(range(ranks)) is None:
        peer = runner(Task("cuda", ranks, TransportChoice.PEER, size))
    host = runner(Task("cuda", ranks, TransportChoice.HOST, size))
    if peer is not None:
        found.append(_peer(peer, host))
    return [*found, _host(host, peer_works=peer is not None and peer.outcome == "proved")]


def _cpu(proof: Proof) -> Finding:
    if proof.outcome == "proved":
        return ok("CPU ranks", f"{proof.text} through shared memory")
    return fail("CPU ranks", proof.text, "see shared memory above; LLM_ALLREDUCE_STRATEGY=NCCL does without")


def _peer(proof: Proof, host: Proof) -> Finding:
    if proof.outcome == "proved":
        return ok("peer access", f"proved: {proof.text}")
    if proof.outcome == "hung":
        advice = "set LLM_ALLREDUCE_TRANSPORT=host and NCCL_P2P_DISABLE=1; see PCIe path, and dmesg for Xid errors"
        return fail("peer access", proof.text, advice)
    if host.outcome == "proved":
        advice = "nothing: host memory is used instead, which is slower; LLM_ALLREDUCE_TRANSPORT=host saves the attempt"
        return warn("peer access", proof.text, advice)
    return fail("peer access", proof.text, "see PCIe path and GPU sharing above")


def _host(proof: Proof, *, peer_works: bool) -> Finding:
    if proof.outcome == "proved":
        return ok("host memory", f"proved: {proof.text}")
    advice = "see shared memory and locked memory above"
    if peer_works:
        return warn("host memory", proof.text, f"nothing as long as peer access works; {advice}")
    return fail("host memory", proof.text, advice)
