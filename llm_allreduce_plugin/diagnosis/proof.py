"""The proof that ranks reach each other: real processes write, read and sum real bytes.

In a session of processes of their own, which ends at a deadline whatever a broken link does to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from llm_allreduce_plugin.algorithms.facts import SUPPORTED_WORLD_SIZES
from llm_allreduce_plugin.base import processes
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, TransportChoice
from llm_allreduce_plugin.diagnosis.finding import Finding, fail, ok, warn
from llm_allreduce_plugin.group.layouts import peer_refusal, transports
from llm_allreduce_plugin.topology import NodeTopology
from llm_allreduce_plugin.topology.links import Transport

if TYPE_CHECKING:
    from llm_allreduce_plugin.measure.ranks import RankContext

TIMEOUT_S = 120.0  # eight ranks import torch, make contexts and NCCL's group
WAIT_S = 10.0  # a rank for a peer
COUNTS = (1000, 300_007)  # elements: in one step and in two
DTYPE = "bfloat16"
_CHILD = """
import sys
from llm_allreduce_plugin.base.processes import end_with_parent
end_with_parent(int(sys.argv[2]))
from llm_allreduce_plugin.diagnosis.proof import main
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


# -- in the processes that prove ---------------------------------------------------------------------------------------


def prove(context: RankContext, task: Task) -> str | None:
    """On a rank: a communicator over this transport alone, and sums whose every bit is compared. None: proved."""
    import torch

    from llm_allreduce_plugin.measure.answers import make_case, wrong_elements

    settings = {"transport": task.transport, "timeout_s": WAIT_S, "workspace_bytes": task.workspace_bytes}
    group = context.communicator("MINLATENCY", **settings)
    try:
        if group.facts.transport is Transport.NONE:
            return group.facts.no_transport_reason
        for count in COUNTS:
            mine, expected = make_case(context, count, getattr(torch, DTYPE))
            ran = group.explain(mine.shape, mine.dtype).strategy
            if ran is not AllReduceStrategy.MINLATENCY:
                return f"{ran} ran instead of a kernel"
            wrong = wrong_elements(group.all_reduce(mine), expected, exact=True, world_size=context.world_size)
            wrong = max(context.gather(wrong))  # so that all ranks stop, or none
            if wrong:
                return f"{wrong} of {count} sums are wrong"
        return None
    finally:
        group.close()


def _say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def _cause(tracebacks: str) -> str:
    """What the first rank to fail raised: tracebacks are indented, what was raised is not."""
    lines = [line for line in tracebacks.splitlines() if line and not line[0].isspace()]
    raised = [number for number, line in enumerate(lines) if line.startswith("Traceback")]
    return " ".join(tracebacks.split()) if not raised else " ".join(lines[raised[0] + 1 : raised[0] + 3])


def main() -> None:
    """In the child: JSON lines of where it is, the last one with the answer."""
    fields = json.loads(sys.argv[1])
    task = Task(fields["device"], fields["ranks"], TransportChoice(fields["transport"]), fields["workspace_bytes"])
    _say(step="loading torch")
    from llm_allreduce_plugin.measure.ranks import RankEndedError, RankPool

    if task.device == "cuda":
        import torch

        if torch.cuda.device_count() < task.ranks:
            _say(answer=f"torch sees {torch.cuda.device_count()} of {task.ranks} GPUs")
            return
    _say(step=f"starting {task.ranks} ranks{' and NCCL' if task.device == 'cuda' else ''}")
    try:
        with RankPool(task.ranks, task.device) as pool:
            _say(step="ranks writing to and reading from each other")
            answer = next(filter(None, pool.run(prove, task, timeout_s=TIMEOUT_S)), None)
    except AssertionError as error:  # of all ranks, the tracebacks; the pool says it so
        answer = _cause(str(error))
    except RankEndedError as error:
        answer = str(error)
    _say(answer=answer)


# -- around them -------------------------------------------------------------------------------------------------------


def _lines(output: bytes) -> list[dict[str, str | None]]:
    found = []
    for line in output.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            parsed = json.loads(line)
            if isinstance(parsed, dict):
                found.append(parsed)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """All of its session, at once. What the kernel does not let go is left behind, not waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def run(task: Task, *, timeout_s: float = TIMEOUT_S, command: Sequence[str] = (sys.executable, "-c", _CHILD)) -> Proof:
    """Prove it, within ``timeout_s`` seconds."""
    environment = dict(os.environ)
    if task.transport is TransportChoice.HOST:
        environment["NCCL_P2P_DISABLE"] = "1"  # the links may be broken, and are not what is proved
    started = time.monotonic()
    process = subprocess.Popen(  # noqa: S603
        [*command, json.dumps(dataclasses.asdict(task)), str(os.getpid())],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    forget = processes.at_last(lambda: _end(process))
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as expired:
        steps = [line["step"] for line in _lines(expired.stdout or b"") if "step" in line]
        return Proof("hung", f"no answer within {timeout_s:g} s; the last step was: {steps[-1] if steps else 'none'}")
    finally:
        _end(process)
        forget()
    seconds = time.monotonic() - started
    answers = [line["answer"] for line in _lines(output) if "answer" in line]
    if not answers:
        last = (errors.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return Proof("failed", f"the ranks ended early: {last}")
    if answers[-1] is not None:
        return Proof("failed", answers[-1])
    return Proof("proved", f"{task.ranks} ranks summed to the bit ({seconds:.0f} s)")


Runner = Callable[[Task], Proof]


def largest_group(gpus: int) -> int:
    """Ranks that kernels exist for, on so many GPUs; 0 when there are too few."""
    return max((size for size in SUPPORTED_WORLD_SIZES if size <= gpus), default=0)


def findings(topology: NodeTopology, config: AllReduceConfig, runner: Runner = run) -> list[Finding]:
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
