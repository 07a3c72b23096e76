"""How long GPU ranks wait: longer in first calls, not for peers that are gone; and that a full queue silences nobody.

Waits that expire end the CUDA context, so each test is a process of its own.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llm_allreduce_plugin import _C
from tests.support.local_group import LocalGroup

pytestmark = pytest.mark.gpu(1)

PRELUDE = """
import sys, threading, time, torch
from llm_allreduce_plugin.runtime.failures import failure_of
from tests.support.local_group import LocalGroup

kind = {"in_band": {}, "flagged": {"in_band": False}, "host": {"host": True}}[sys.argv[1]]
inputs = [torch.ones(1000, device="cuda") for _ in range(2)]
outputs = [torch.empty_like(part) for part in inputs]

def finish(group, label):
    start = time.monotonic()
    try:
        torch.cuda.synchronize()
    except Exception as error:
        what = f"{type(error).__name__} after {time.monotonic() - start:.1f} s"
        print(f"{label}: {what}, {failure_of(group.workspaces[0])}")
    else:
        print(f"{label}: well after {time.monotonic() - start:.1f} s")
"""
KINDS = pytest.mark.parametrize("kind", ("in_band", "flagged", "host"))


def run(script: str, kind: str) -> list[str]:
    command = [sys.executable, "-c", PRELUDE + script, kind]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode in (0, 1), (result.stdout, result.stderr[-2000:])
    return result.stdout.splitlines()


FIRST_CALLS = """
group = LocalGroup(2, timeout_s=1.0, first_timeout_s=30.0, **kind)
plans = [group.plan(rank, "ONESHOT", inputs[rank]) for rank in range(2)]
call = lambda rank: plans[rank](inputs[rank].data_ptr(), outputs[rank].data_ptr(), group.streams[rank].cuda_stream)
call(0); time.sleep(2.5); call(1); finish(group, "eager")
graphs = []
for rank in range(2):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=group.streams[rank]):
        call(rank)
    graphs.append(graph)
def replay(rank):
    with torch.cuda.stream(group.streams[rank]):
        graphs[rank].replay()
replay(0); time.sleep(2.5); replay(1); finish(group, "graph")
call(0); call(1); finish(group, "between")
%s; finish(group, "again")
"""


@KINDS
@pytest.mark.parametrize("again", ("call(0)", "replay(0)"), ids=("eager", "graph"))
def test_the_first_call_and_that_of_a_graph_wait_longer_and_later_ones_do_not(kind: str, again: str) -> None:
    eager, graph, between, last = run(FIRST_CALLS % again, kind)
    assert eager.startswith("eager: well")
    assert graph.startswith("graph: well")
    assert between.startswith("between: well")
    assert "rank 0 waited 1 s for rank 1 in ONESHOT/gather" in last


@KINDS
def test_a_first_call_does_not_wait_longer_for_a_peer_that_is_gone(kind: str) -> None:
    lines = run(
        """
group = LocalGroup(2, timeout_s=1.0, first_timeout_s=60.0, **kind)
threading.Timer(2.5, group.workspaces[0].mark_gone, (1,)).start()
group.start(0, "ONESHOT", inputs[0], outputs[0])
finish(group, "first")
""",
        kind,
    )
    assert "for rank 1 in ONESHOT/gather" in lines[0]
    waited = float(lines[0].split("rank 0 waited ")[1].split()[0])  # CUDA takes seconds more to end a context
    assert 2.3 < waited < 4.0


@KINDS
def test_others_can_speak_while_a_launch_waits_for_room_in_the_queue(kind: str) -> None:
    lines = run(
        """
group = LocalGroup(2, timeout_s=4.0, **kind)
ticks = [time.monotonic()]
def tick():
    while True:
        time.sleep(0.05)
        ticks.append(time.monotonic())
threading.Thread(target=tick, daemon=True).start()
plan = group.plan(0, "ONESHOT", inputs[0])
arguments = inputs[0].data_ptr(), outputs[0].data_ptr(), group.streams[0].cuda_stream
calls, start = 0, time.monotonic()
try:
    while time.monotonic() - start < 10 and plan(*arguments) == 0:
        calls += 1
except RuntimeError:
    pass
silence = max(b - a for a, b in zip(ticks, ticks[1:]))
print(f"{time.monotonic() - start:.1f} s in {calls} calls, longest silence {silence:.2f}")
""",
        kind,
    )
    seconds, silence = float(lines[-1].split()[0]), float(lines[-1].split()[-1])
    assert seconds > 2, "the queue was never full: this shows nothing"
    assert silence < 1.0


def test_blocks_that_would_not_all_run_at_once_are_refused() -> None:
    group = LocalGroup(4, lanes=_C.MAX_LANES, workspace_mib=256, staged=True)
    data = torch.zeros(1 << 20, dtype=torch.bfloat16, device=group.device)
    # 256 threads with the releaser's: at most 8 such blocks fit a multiprocessor, and with these kernels' registers 2.
    threads = _C.MAX_STAGED_THREADS
    plan = _C.Plan(
        group.workspaces[0],
        algorithm=_C.TWO_SHOT,
        exchange=_C.STAGED,
        count=data.numel(),
        dtype=2,
        lanes=_C.MAX_LANES,
        threads=threads,
        chunk_vectors=1,
    )
    with pytest.raises(RuntimeError, match="cannot run all blocks of the call at the same time"):
        plan(data.data_ptr(), data.data_ptr(), group.streams[0].cuda_stream)
