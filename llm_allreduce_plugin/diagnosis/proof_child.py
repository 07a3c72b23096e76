"""The process that starts the ranks of a proof: it is told what to prove, and says where it is and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm_allreduce_plugin.config import AllReduceStrategy, TransportChoice
from llm_allreduce_plugin.diagnosis.proof import COUNTS, DTYPE, TIMEOUT_S, WAIT_S, Task
from llm_allreduce_plugin.topology.links import Transport

if TYPE_CHECKING:
    from llm_allreduce_plugin.measure.ranks import RankContext, RankPool


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


def _tasks() -> Iterator[Task]:
    """What the parent asks for, a JSON line each, until it ends that or itself."""
    for line in sys.stdin:
        fields = json.loads(line)
        yield Task(fields["device"], fields["ranks"], TransportChoice(fields["transport"]), fields["workspace_bytes"])


def _start(task: Task) -> RankPool:
    """The ranks: forked, so that they need not load torch once more, and without NCCL, which no proof asks anything.

    Raises:
        RankEndedError: a rank has ended at its start.
    """
    import torch

    from llm_allreduce_plugin.measure.ranks import RankEndedError, RankPool

    try:
        return RankPool(task.ranks, task.device, forked=True, nccl_at_once=False)
    except RankEndedError as error:
        # One that was killed is what is looked for; one that cannot use CUDA has raised.
        if task.device == "cpu" or "ended with exit code" not in str(error):
            raise
        # Not asked before: it may use CUDA, which ranks could then not.
        if (seen := torch.cuda.device_count()) < task.ranks:
            message = f"torch sees {seen} of {task.ranks} GPUs"
            raise RankEndedError(message) from None
    return RankPool(task.ranks, task.device, nccl_at_once=False)  # something may have used CUDA all the same


def main() -> None:
    """In the child: JSON lines of where it is, and of each task the answer. The first that is not proved ends it."""
    _say(step="loading torch")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # or whoever asks whether there is CUDA uses it
    import llm_allreduce_plugin.measure.answers  # noqa: F401  (for the ranks, once)
    from llm_allreduce_plugin.measure.ranks import RankEndedError

    with contextlib.ExitStack() as ends:
        pool: RankPool | None = None
        for task in _tasks():
            answer: str | None
            try:
                if pool is None:
                    _say(step=f"starting {task.ranks} ranks")
                    pool = ends.enter_context(_start(task))
                _say(step="ranks writing to and reading from each other")
                answer = next(filter(None, pool.run(prove, task, timeout_s=TIMEOUT_S)), None)
            except AssertionError as error:  # of all ranks, the tracebacks; the pool says it so
                answer = _cause(str(error))
            except RankEndedError as error:
                answer = str(error)
            _say(answer=answer)
            if answer is not None:
                return
