"""A plugin for SGLang's scheduler that stamps the engine's steps. ``sglang_decode.py`` installs it beside ours.

It imports nothing of this repository, and does the same to every variant:

1. ``Scheduler.get_new_batch_prefill``, around it: the first request of a batch waits until all of it have come. So
   variants prefill and decode the same batches, whatever the timing of their messages: batch sizes choose the kernels
   of matrix products, and those the last bits. A request's id is ``COUNT-BATCH-NUMBER``: how many its batch has, which
   batch it is in, and which of them it is. Ranks see the same requests in the same step, and so agree.
2. ``Scheduler.process_batch_result``, after it: rank 0 writes a line for each step of decode, its time in seconds and
   its batch size, to ``steps.txt`` in the folder that ``DECODE_PROBE`` names.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

FOLDER = "DECODE_PROBE"
STEPS = "steps.txt"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def register() -> None:
    """Called by SGLang in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_SCHEDULER}.get_new_batch_prefill", wait_for_batch, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}.process_batch_result", stamp, HookType.AFTER)


def wait_for_batch(prefill: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:  # noqa: ANN401
    """Let a batch begin once it is complete; it then goes on, in parts where it has to."""
    waiting = scheduler.waiting_queue
    if not waiting or complete([request.rid for request in waiting], _begun()):
        return prefill(scheduler, running_batch)
    from sglang.srt.managers.schedule_batch import NextBatchPlan

    return NextBatchPlan(batch_to_run=None, running_batch=running_batch)


def complete(waiting: list[str], begun: set[str]) -> bool:
    """Whether the batch of the first request may begin, which ``begun`` then remembers.

    ``waiting``: the ids. Requests of other kinds, such as the engine's own for its warm-up, are not held.
    """
    batch, _, number = waiting[0].rpartition("-")
    count = batch.partition("-")[0]
    if not (count.isdigit() and number.isdigit()) or batch in begun:
        return True
    if sum(name.rpartition("-")[0] == batch for name in waiting) < int(count):
        return False
    begun.add(batch)
    return True


@functools.cache
def _begun() -> set[str]:
    return set()


def stamp(_result: object, _scheduler: object, batch: Any, *_args: object, **_kwargs: object) -> None:  # noqa: ANN401
    """After the tokens of a step are there."""
    now = time.perf_counter()
    if batch.forward_mode.is_decode() and (sink := _sink()) is not None:
        sink.write(f"{now} {batch.batch_size()}\n")


@functools.cache
def _sink() -> TextIO | None:
    import torch

    if torch.distributed.get_rank() != 0:
        return None
    # By lines: SGLang ends its schedulers by a signal, and what a buffer still has would be lost.
    return (Path(os.environ[FOLDER]) / STEPS).open("w", buffering=1)
