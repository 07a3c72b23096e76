"""A plugin for vLLM's workers. ``vllm_decode.py`` installs it beside ours, in every variant.

It imports nothing of this repository:

1. ``torch.cuda.CUDAGraph.replay``, around it: events, from whose times the worker's new method ``decode_graph_ms`` says
   how long the GPU took for each of the newest graphs. The engine's steps take longer where the host is waited for.
2. ``Worker.init_device``, before it, with ``vllm_decode.py --hosts``: ``NCCL_HOSTID``, by which NCCL and this package
   tell hosts apart, is set: ``DECODE_RANKS_OF_A_HOST`` ranks after each other share one.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from typing import Any

RANKS_OF_A_HOST = "DECODE_RANKS_OF_A_HOST"
GRAPH_MS = "decode_graph_ms"
KEPT = 1024  # graphs


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.v1.worker.gpu_worker import Worker

    time_graphs(Worker)
    if RANKS_OF_A_HOST in os.environ:
        make_hosts(Worker)


def time_graphs(worker: type) -> None:
    """Give ``worker`` the method ``decode_graph_ms``: milliseconds of graphs since its last call, the newest last."""
    import torch

    replay = torch.cuda.CUDAGraph.replay
    event: Any = torch.cuda.Event
    events: deque[tuple[Any, Any]] = deque(maxlen=KEPT)

    @functools.wraps(replay)
    def timed(graph: Any) -> None:  # noqa: ANN401
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        replay(graph)
        end.record()
        events.append((begin, end))

    def graph_ms(_: Any) -> list[float]:  # noqa: ANN401
        torch.cuda.synchronize()
        taken = [begin.elapsed_time(end) for begin, end in events]
        events.clear()
        return taken

    setattr(torch.cuda.CUDAGraph, replay.__name__, timed)
    setattr(worker, GRAPH_MS, graph_ms)


def make_hosts(worker: Any) -> None:  # noqa: ANN401
    """Have each worker name its host before it does anything on its GPU."""
    init_device = worker.init_device

    @functools.wraps(init_device)
    def on_its_host(self: Any) -> Any:  # noqa: ANN401
        os.environ["NCCL_HOSTID"] = f"host-{self.rank // int(os.environ[RANKS_OF_A_HOST])}"
        return init_device(self)

    worker.init_device = on_its_host
