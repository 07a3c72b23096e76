"""All-reduces into a tensor of the caller's, which peers may store into where it lies in registered memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES
from llm_allreduce_plugin.algorithms.decision import Launch
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import RankMismatchError, ranks_text, ranks_with
from llm_allreduce_plugin.runtime.calls import Call, current_stream_of
from llm_allreduce_plugin.runtime.failures import error_of_status
from llm_allreduce_plugin.runtime.health import Health

# Stores the sum of the first tensor into the second.
CallInto = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def check_output(input_: torch.Tensor, out: torch.Tensor) -> None:
    """That the sum of ``input_`` may be stored into ``out``.

    Raises:
        ValueError: naming what is wrong.
    """
    for name in ("device", "dtype", "shape"):
        wanted, found = getattr(input_, name), getattr(out, name)
        if wanted != found:
            message = f"out: its {name} is {found}, that of the input {wanted}: they must be equal"
            raise ValueError(message)
    if not out.is_contiguous():
        message = f"out: has strides {out.stride()}: must be contiguous"
        raise ValueError(message)
    if input_.numel() and input_.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
        ends = [(part.data_ptr(), part.data_ptr() + _span_bytes(part)) for part in (input_, out)]
        if ends[0][0] < ends[1][1] and ends[1][0] < ends[0][1]:
            message = "out: overlaps the input: must be another tensor"
            raise ValueError(message)


def _span_bytes(tensor: torch.Tensor) -> int:
    """From the first byte of a tensor to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def kernel_call_into(plan: _C.Plan, launch: Launch, health: Health, device: torch.device, name: str) -> CallInto:
    """A function that runs ``plan``, with all that does not change bound. ``name``: of the strategy, for errors."""
    index = device.index
    must_be_aligned = launch.scatter_lanes > 0
    current_stream = current_stream_of(device)

    def run(input_: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        source = input_.contiguous()
        if must_be_aligned and source.data_ptr() % VECTOR_BYTES:
            source = source.clone()
        status = plan(source.data_ptr(), out.data_ptr(), current_stream(index))
        if status != 0:
            if status not in (_C.STATUS_CLOSED, _C.STATUS_BUSY):
                health.raise_error()
            raise error_of_status(status, name)
        return out

    return run


def copied_into(call: Call) -> CallInto:
    """The same of a call that makes its own output."""

    def run(input_: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(call(input_))

    return run


def agree_on_place(agreement: Agreement, offset: int, count: int, dtype: str) -> None:
    """Compare where in registered memory an output lies: it must be the same place on every rank. Collective.

    Raises:
        RankMismatchError: on every rank alike, naming the ranks behind each place.
        StartTimeoutError: a rank did not come: it may be in a call with an output that it has used before.
    """
    place = f"{count} {dtype} at byte {offset}"
    found: list[str] = agreement.gather(place, "to compare where outputs lie in registered memory")
    if len(set(found)) > 1:
        parts = "; ".join(f"{what} on {ranks_text(ranks)}" for what, ranks in ranks_with(found).items())
        message = (
            f"outputs lie at different places in registered memory: {parts}. Every rank must take the same tensors of "
            "registered_empty, in the same order, and pass the same ones to a call"
        )
        raise RankMismatchError(message)
