"""A plugin for vLLM's workers that makes hosts of ranks. ``vllm_decode.py --hosts`` installs it beside ours.

It imports nothing of this repository. ``Worker.init_device``, before it: ``NCCL_HOSTID``, by which NCCL and this
package tell hosts apart, is set: ``DECODE_RANKS_OF_A_HOST`` ranks after each other share one.
"""

from __future__ import annotations

import functools
import os
from typing import Any

RANKS_OF_A_HOST = "DECODE_RANKS_OF_A_HOST"


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.v1.worker.gpu_worker import Worker

    init_device = Worker.init_device

    @functools.wraps(init_device)
    def on_its_host(self: Any) -> Any:  # noqa: ANN401
        os.environ["NCCL_HOSTID"] = f"host-{self.rank // int(os.environ[RANKS_OF_A_HOST])}"
        return init_device(self)

    Worker.init_device = on_its_host
