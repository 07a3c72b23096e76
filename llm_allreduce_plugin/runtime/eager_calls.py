"""Eager calls in one step, from a tensor to a launch, where torch says in C where a tensor lies.

In Python the same steps take longer than the launch. What is not done here (other layouts, other devices, plans that
are more than one kernel) is done in Python as ever: the answer is then None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES, Call, current_stream_of, empty_strided_of, raise_refused
from llm_allreduce_plugin.runtime.health import Health

EagerCall = Callable[[torch.Tensor], torch.Tensor | None]


def no_eager_call(_input: torch.Tensor) -> None:
    """Where there are none."""


class EagerCalls:
    """Of one communicator: what :class:`_C.EagerCalls` keeps, as long as the plans of the planner are kept.

    Args:
        device: this rank's.

    Attributes:
        call: gives the sum of a tensor, or None where Python must take the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._calls = _native(device)
        self.call: EagerCall = no_eager_call if self._calls is None else cast("EagerCall", self._calls)

    def around(self, call: Call) -> Call:
        """The sum in one step where that is to be had, by ``call`` otherwise."""
        if self._calls is None:
            return call
        eager_call = self.call

        def run(input_: torch.Tensor) -> torch.Tensor:
            output = eager_call(input_)
            return call(input_) if output is None else output

        return run

    def keep(
        self, count: int, dtype: torch.dtype, plan: _C.Plan, health: Health, name: str, *, must_be_aligned: bool
    ) -> None:
        """From now on, contiguous messages of this size and type run by ``plan``. ``name``: of the strategy."""
        if self._calls is None:
            return

        def refused(status: int) -> None:
            raise_refused(status, health, name)

        self._calls.keep(count, DTYPE_CODES[dtype], dtype, plan, must_be_aligned, refused)

    def forget(self, key: tuple[int, torch.dtype]) -> None:
        """Those of this count and type do no longer."""
        if self._calls is not None and key[1] in DTYPE_CODES:
            self._calls.forget(key[0], DTYPE_CODES[key[1]])

    def clear(self) -> None:
        """Let go of all plans."""
        if self._calls is not None:
            self._calls.clear()


def _native(device: torch.device) -> _C.EagerCalls | None:
    """None where torch has no such interface (before 2.10), or one that says something else than torch itself."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    empty_strided = empty_strided_of(device)
    if api is None or empty_strided is None:
        return None
    index = _C.CPU if device.type == "cpu" else device.index
    try:
        calls = _C.EagerCalls(api, torch.Tensor, index, empty_strided, current_stream_of(device))
        for dtype, code in DTYPE_CODES.items():
            probe = torch.empty((2, 3), dtype=dtype, device=device)
            seen = [(probe.data_ptr(), 6, code, is_contiguous) for is_contiguous in (True, False)]
            if [calls.see(probe), calls.see(probe.t())] != seen:
                return None
    except (RuntimeError, TypeError, ValueError):  # a capsule of another kind or version
        return None
    return calls
