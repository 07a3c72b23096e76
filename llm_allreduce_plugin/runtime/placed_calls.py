"""All-reduces into a tensor of the caller's, which peers may store into where it lies in registered memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES
from llm_allreduce_plugin.algorithms.decision import Launch
from llm_allreduce_plugin.runtime.calls import Call, current_stream_of, raise_refused
from llm_allreduce_plugin.runtime.health import Health
from llm_allreduce_plugin.transport.registered import RegisteredPool

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


def registered_empty(
    pool: RegisteredPool | None, why_none: str, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """A tensor of ``pool``; ``why_none``: the reason where there is none.

    Raises:
        RuntimeError: there is no registered memory, or too little of it is free.
    """
    if pool is None:
        message = f"no registered memory: {why_none}"
        raise RuntimeError(message)
    tensor = pool.take(shape, dtype)
    if tensor is None:
        name = str(dtype).removeprefix("torch.")
        message = (
            f"registered memory is full: a tensor {tuple(shape)} of {name} does not fit into what is free of "
            f"{pool.size} bytes, and it cannot grow: set registered_pool to more"
        )
        raise RuntimeError(message)
    return tensor


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
            raise_refused(status, health, name)
        return out

    return run


def copied_into(call: Call) -> CallInto:
    """The same of a call that makes its own output."""

    def run(input_: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(call(input_))

    return run


def placing_call(plan: _C.Plan, launch: Launch, health: Health, pool: RegisteredPool, name: str) -> Call:
    """A function that runs ``plan``, whose results peers store into tensors of ``pool``.

    Where nothing is free there, results are copied out. That is this rank's affair alone: peers store all the same.
    """
    into = kernel_call_into(plan, launch, health, pool.device, name)
    on_gpu = pool.device.type == "cuda"
    current_stream, index = current_stream_of(pool.device), pool.device.index

    def run(input_: torch.Tensor) -> torch.Tensor:
        stream = current_stream(index)
        capture = _C.capture_of(stream) if on_gpu else 0
        out = pool.take(input_.shape, input_.dtype, capture)
        if out is None:
            out = into(input_, pool.lend(input_.shape, input_.dtype, stream, capture)).clone()
            pool.copied(capture)
        else:
            into(input_, out)
        return out if input_.is_contiguous() else torch.empty_like(input_).copy_(out)

    return run
