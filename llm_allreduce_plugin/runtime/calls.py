"""From a decision to a function of one tensor: what an eager call does between Python and the launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms import facts
from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES
from llm_allreduce_plugin.algorithms.decision import Launch
from llm_allreduce_plugin.runtime.failures import error_of_status
from llm_allreduce_plugin.runtime.health import Health

Call = Callable[[torch.Tensor], torch.Tensor]

DTYPE_CODES = {getattr(torch, name): code for name, code in facts.DTYPE_CODES.items()}

# torch.cuda.current_stream() makes a Stream object first, which takes longer than the launch. Kept by torch for its
# compiler; the public way where it is gone.
_current_raw_stream: Callable[[int | None], int] = getattr(
    torch._C,  # noqa: SLF001
    "_cuda_getCurrentRawStream",
    lambda index: torch.cuda.current_stream(index).cuda_stream,
)


def _no_stream(_index: int | None) -> int:
    return 0


EmptyStrided = Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor]


def empty_strided_of(device: torch.device) -> EmptyStrided | None:
    """What torch's compiler allocates with, past the dispatcher; on the current device. None where it is gone.

    Allocating is most of an eager call's own time.
    """
    guards = getattr(torch._C._dynamo, "guards", None)  # noqa: SLF001
    found: EmptyStrided | None = getattr(guards, f"_empty_strided_{device.type}", None)
    return found


def _empty_strided_like(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


_empty_strided: EmptyStrided = empty_strided_of(torch.device("cuda")) or _empty_strided_like


def torch_all_reduce(group: dist.ProcessGroup) -> Call:
    """``torch.distributed.all_reduce`` on a copy."""

    def run(input_: torch.Tensor) -> torch.Tensor:
        output = input_.clone(memory_format=torch.contiguous_format)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(output, group=group)
        return output if input_.is_contiguous() else torch.empty_like(input_).copy_(output)

    return run


def current_stream_of(device: torch.device) -> Callable[[int | None], int]:
    """A function that gives the current stream of a device, whose index it takes; of a CPU rank, none."""
    return _current_raw_stream if device.type == "cuda" else _no_stream


def plan_of(
    workspace: _C.Workspace,
    launch: Launch,
    count: int,
    dtype: torch.dtype,
    peer_distances: Sequence[int] = (),
    norm: _C.Norm | None = None,
    *,
    pools: Sequence[int] = (),
) -> _C.Plan:
    """A launch for messages of ``count`` elements, ready to be called with addresses.

    ``peer_distances``: PULL: bytes from this rank's input to where it sees each rank's. ``norm``: RMS_NORM: which one.
    ``pools``: PLACE: where this rank sees each rank's registered memory.
    """
    return _C.Plan(
        workspace,
        algorithm=int(launch.algorithm),
        exchange=int(launch.exchange),
        wire=launch.wire_code,
        count=count,
        dtype=DTYPE_CODES[dtype],
        lanes=launch.lanes,
        threads=launch.threads,
        chunk_vectors=launch.chunk_vectors,
        scatter_lanes=launch.scatter_lanes,
        drain_lanes=launch.drain_lanes,
        epilogue=int(launch.epilogue),
        domains=launch.domains,
        peer_distances=peer_distances,
        pools=pools,
        cluster=launch.cluster,
        norm=norm,
    )


def kernel_call(plan: _C.Plan, launch: Launch, health: Health, device: torch.device, name: str) -> Call:
    """A function that runs ``plan``, with all that does not change bound. ``name``: of the strategy, for errors."""
    index = device.index
    must_be_aligned = launch.scatter_lanes > 0
    on_gpu = device.type == "cuda"
    current_stream = current_stream_of(device)

    def run(input_: torch.Tensor) -> torch.Tensor:
        # Kernels see the elements in logical order, so that ranks agree whatever their strides.
        source = input_.contiguous()
        if must_be_aligned and source.data_ptr() % VECTOR_BYTES:
            source = source.clone()
        if on_gpu:
            output = _empty_strided(tuple(source.shape), source.stride(), source.dtype)
            if output.get_device() != index:  # the caller's current device is another
                output = torch.empty_like(source)
        else:
            output = torch.empty_like(source)
        status = plan(source.data_ptr(), output.data_ptr(), current_stream(index))
        if status != 0:
            raise_refused(status, health, name)
        return output if source is input_ or input_.is_contiguous() else torch.empty_like(input_).copy_(output)

    return run


def raise_refused(status: int, health: Health, name: str) -> None:
    """Raise the error for a call that was refused, or has broken the group. ``name``: of the strategy."""
    if status not in (_C.STATUS_CLOSED, _C.STATUS_BUSY):
        health.raise_error()
    raise error_of_status(status, name)
