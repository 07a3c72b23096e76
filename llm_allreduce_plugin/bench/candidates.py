"""What is compared: this package's strategies, and what else is installed that can all-reduce.

Every candidate is opened on all ranks together. One that cannot be is left out with its reason, on every rank alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llm_allreduce_plugin.algorithms.low_precision_algorithm import algorithm_of
from llm_allreduce_plugin.algorithms.user_buffer import DEFAULT_CPU_POOL_BYTES, largest_output
from llm_allreduce_plugin.base.agreement import on_every_rank
from llm_allreduce_plugin.config import LowPrecisionAlgorithm, WireFormat
from llm_allreduce_plugin.measure.answers import MORE_ERROR, MOST_ERROR
from llm_allreduce_plugin.measure.ranks import RankContext

MIB = 1 << 20
REGISTERED_POOL_BYTES = 1024 * MIB  # of UB, for messages to a quarter of it

# A function that all-reduces one given input and returns the output.
Bound = Callable[[], torch.Tensor]


@dataclasses.dataclass
class Candidate:
    """One implementation, ready to run.

    Attributes:
        bind: makes the call for one input. An implementation that works in place, or only on memory of its own, copies
            the input there first, once.
        exact: gives the bits of the rank-ordered fp32 sum.
        most_error: for lossy ones, the relative L2 error that their answer may have on normal data.
        in_place: the call overwrites its input, so only the first answer after ``bind`` can be checked.
        graphs_overwrite: calls in a graph do so, others do not: answers of graphs cannot be checked.
        min_bytes: the smallest message that it takes.
        max_bytes: the largest.
        multiple_of: bytes that a message must be a multiple of.
        capturing: what it wants around a graph capture.
        close: lets go of its memory.
    """

    bind: Callable[[torch.Tensor], Bound]
    exact: bool = False
    most_error: float | None = None
    in_place: bool = False
    graphs_overwrite: bool = False
    min_bytes: int = 0
    max_bytes: int = 1 << 62
    multiple_of: int = 1
    capturing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    close: Callable[[], None] = lambda: None

    def refusal(self, payload_bytes: int) -> str | None:
        """Why a message of this size is left out, or None."""
        if payload_bytes < self.min_bytes:
            return f"takes at least {self.min_bytes} bytes"
        if payload_bytes > self.max_bytes:
            return f"takes at most {self.max_bytes} bytes"
        if payload_bytes % self.multiple_of:
            return f"takes multiples of {self.multiple_of} bytes"
        return None


@dataclasses.dataclass(frozen=True)
class OurSettings:
    """What this package's candidates are to be measured with.

    Attributes:
        transport: ``auto``, ``peer`` or ``host``.
        wire_format: of LOWPRECISION.
        tuning_profile: as the setting of that name.
        registered_pool: as the setting of that name, in bytes.
    """

    transport: str = "auto"
    wire_format: WireFormat = WireFormat.FP8
    tuning_profile: str | None = None
    registered_pool: int | None = None


Opener = Callable[[RankContext, OurSettings], Candidate]


def _ours(strategy: str) -> Opener:
    def open_(context: RankContext, settings: OurSettings) -> Candidate:
        group = context.communicator(strategy, transport=settings.transport, tuning_profile=settings.tuning_profile)
        decision = group.explain((4096,), torch.bfloat16)
        if decision.strategy == "NCCL":
            message = decision.reason
            raise RuntimeError(message)
        return Candidate(bind=lambda x: lambda: group.all_reduce(x), exact=not decision.runs_another, close=group.close)

    return open_


def _registered(context: RankContext, settings: OurSettings) -> Candidate:
    """UB with memory for its largest messages; what does not pay travels by slots."""
    group = context.communicator(
        "UB",
        transport=settings.transport,
        tuning_profile=settings.tuning_profile,
        registered_pool=None if context.device.type == "cpu" else REGISTERED_POOL_BYTES,
    )
    decision = group.explain((1 << 20,), torch.bfloat16)
    if decision.runs_another and not decision.by_design:
        group.close()
        raise RuntimeError(decision.reason)

    def bind(x: torch.Tensor) -> Bound:
        out = group.registered_empty(tuple(x.shape), x.dtype)
        return lambda: group.all_reduce(x, out)

    most = group.config.registered_pool or DEFAULT_CPU_POOL_BYTES
    return Candidate(bind, exact=True, max_bytes=largest_output(int(most)), close=group.close)


def _low_precision(context: RankContext, settings: OurSettings) -> Candidate:
    """At every size, also where the policy would rather stay exact."""
    group = context.communicator(
        "LOWPRECISION",
        transport=settings.transport,
        low_precision={"wire_format": settings.wire_format, "min_bytes": 0},
    )
    decision = group.explain((1 << 20,), torch.bfloat16)
    if decision.runs_another:
        raise RuntimeError(decision.reason)
    algorithm = algorithm_of(group.config, group.facts).algorithm
    encodes_once_more = algorithm in (LowPrecisionAlgorithm.RING, LowPrecisionAlgorithm.HIERARCHICAL)
    most_error = MOST_ERROR[settings.wire_format] * (MORE_ERROR if encodes_once_more else 1)
    return Candidate(bind=lambda x: lambda: group.all_reduce(x), most_error=most_error, close=group.close)


def _peer(open_: Callable[[RankContext], Candidate]) -> Opener:
    """A candidate that our settings say nothing to."""
    return lambda context, _settings: open_(context)


def _reduce_in_place(context: RankContext, buffer: torch.Tensor) -> Bound:
    def call() -> torch.Tensor:
        dist.all_reduce(buffer, group=context.group)
        return buffer

    return call


def _process_group(context: RankContext) -> Candidate:
    return Candidate(bind=lambda x: _reduce_in_place(context, x.clone()), in_place=True)


def _nccl_windows(context: RankContext) -> Candidate:
    """NCCL on buffers registered as symmetric windows (NCCL 2.27 and newer)."""
    backend: Any = context.group._get_backend(context.device)  # noqa: SLF001  (torch documents this way)
    pool = torch.cuda.MemPool(backend.mem_allocator)
    registered: list[int] = []

    def bind(x: torch.Tensor) -> Bound:
        with torch.cuda.use_mem_pool(pool):
            buffer = torch.empty_like(x)
        buffer.copy_(x)
        if registered:
            backend.deregister_mem_pool(pool)
            registered.clear()
        backend.register_mem_pool(pool, symm=True)
        registered.append(1)
        return _reduce_in_place(context, buffer)

    def close() -> None:
        if registered:
            backend.deregister_mem_pool(pool)

    return Candidate(bind, in_place=True, close=close)


def _symmetric_memory(operator: str, max_bytes: int, *, in_place: bool) -> Callable[[RankContext], Candidate]:
    """Torch's own symmetric-memory kernels."""

    def open_(context: RankContext) -> Candidate:
        import torch.distributed._symmetric_memory as symm_mem

        run = getattr(torch.ops.symm_mem, operator)
        name = context.group.group_name
        storage = symm_mem.empty(max_bytes, dtype=torch.uint8, device=context.device)
        symm_mem.rendezvous(storage, context.group)

        def bind(x: torch.Tensor) -> Bound:
            buffer = storage[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)
            buffer.copy_(x)
            torch.cuda.synchronize(context.device)
            dist.barrier(group=context.control_group)
            return lambda: run(buffer, "sum", name)

        return Candidate(bind, in_place=in_place, max_bytes=max_bytes, multiple_of=16 * context.world_size)

    return open_


def _vllm_custom(context: RankContext) -> Candidate:
    """VLLM's custom all-reduce, as vLLM captures it."""
    from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

    limit = 512 * MIB  # vLLM's own limit is 8 MiB; here it is to show where it stops paying
    custom = CustomAllreduce(context.control_group, context.device, max_size=limit)
    if custom.disabled:
        message = "vLLM disables it here"
        raise RuntimeError(message)

    def bind(x: torch.Tensor) -> Bound:
        def call() -> torch.Tensor:
            output: torch.Tensor | None = custom.all_reduce(x, registered=custom._IS_CAPTURING)  # noqa: SLF001
            assert output is not None
            return output

        return call

    return Candidate(bind, max_bytes=limit - 1, multiple_of=16, capturing=custom.capture, close=custom.close)


def _flashinfer(context: RankContext) -> Candidate:
    """FlashInfer 0.6's one-shot and two-shot kernels, its choice between them; its back end without multicast."""
    from flashinfer import comm
    from flashinfer.comm.mnnvl import TorchDistBackend

    hidden, limit = 2048, 16 * MIB
    workspace = comm.create_allreduce_fusion_workspace(
        backend="trtllm",
        world_size=context.world_size,
        rank=context.rank,
        max_token_num=limit // (2 * hidden),
        hidden_dim=hidden,
        dtype=torch.bfloat16,
        comm_backend=TorchDistBackend(group=context.control_group),
        group=context.control_group,
    )

    def bind(x: torch.Tensor) -> Bound:
        rows = x.view(-1, hidden)
        return lambda: comm.allreduce_fusion(
            input=rows, workspace=workspace, pattern=comm.AllReduceFusionPattern.kAllReduce, launch_with_pdl=True
        ).view(-1)

    return Candidate(bind, max_bytes=limit, multiple_of=2 * hidden, close=workspace.destroy)


def sglang_world(context: RankContext) -> contextlib.AbstractContextManager[object]:
    """In it, SGLang finds the group of all ranks, which it asks whether GPUs see each other, as if a server ran."""
    try:
        from sglang.srt.runtime_context import get_parallel
    except ImportError:  # older than 0.5.23: it asks nobody
        return contextlib.nullcontext()

    def barrier() -> None:
        dist.barrier(group=context.control_group)

    world = types.SimpleNamespace(local_rank=context.rank, barrier=barrier)
    entered: contextlib.AbstractContextManager[object] = get_parallel().override(world_group=world)
    return entered


def _sglang(context: RankContext) -> Candidate:
    """SGLang 0.5's custom all-reduce, whichever of its versions it would take."""
    from sglang.srt.distributed.device_communicators.custom_all_reduce import dispatch_custom_allreduce

    with sglang_world(context):
        custom = dispatch_custom_allreduce(group=context.control_group, device=context.device)(
            group=context.control_group, device=context.device
        )
    if custom.disabled:
        message = "SGLang disables it here"
        raise RuntimeError(message)

    def bind(x: torch.Tensor) -> Bound:
        if not custom.should_custom_ar(x):
            message = f"SGLang sends {x.numel() * x.element_size()} bytes elsewhere"
            raise ValueError(message)
        mine = x.clone()
        return lambda: custom.custom_all_reduce(mine)

    return Candidate(
        bind,
        graphs_overwrite=True,  # where it takes two steps that pull (its custom_all_reduce.cuh)
        max_bytes=16 * MIB,
        multiple_of=16,
        capturing=custom.capture,
        close=custom.close,
    )


OURS: dict[str, Opener] = {name: _ours(name) for name in ("ONESHOT", "TWOSHOT", "MINLATENCY", "AUTO")} | {
    "UB": _registered,
    "LOWPRECISION": _low_precision,
}
_CPU: dict[str, Opener] = OURS | {"gloo": _peer(_process_group)}
_GPU: dict[str, Opener] = OURS | {
    "NCCL": _peer(_process_group),
    "NCCL-windows": _peer(_nccl_windows),
    "torch-one-shot": _peer(_symmetric_memory("one_shot_all_reduce", 16 * MIB, in_place=False)),
    "torch-two-shot": _peer(_symmetric_memory("two_shot_all_reduce_", 512 * MIB, in_place=True)),
    "vLLM-custom": _peer(_vllm_custom),
    "FlashInfer": _peer(_flashinfer),
    "SGLang": _peer(_sglang),
}


def names(device_type: str) -> tuple[str, ...]:
    """Every candidate for ranks on this kind of device, ours first."""
    return tuple(_CPU if device_type == "cpu" else _GPU)


def open_candidate(context: RankContext, name: str, settings: OurSettings) -> Candidate:
    """Collective.

    Raises:
        RuntimeError: on every rank alike, with the reason, when any rank cannot run it.
    """
    make = (_CPU if context.device.type == "cpu" else _GPU)[name]
    return on_every_rank(lambda: make(context, settings), context.control_group, RuntimeError)
