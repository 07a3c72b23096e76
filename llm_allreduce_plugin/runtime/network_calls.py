"""All-reduces over several hosts that a network joins: two kernels, and an exchange between them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms import network
from llm_allreduce_plugin.algorithms.decision import Algorithm, Launch
from llm_allreduce_plugin.base.agreement import is_on_file
from llm_allreduce_plugin.base.step import store_of
from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.group.board import Board
from llm_allreduce_plugin.group.places import Places
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES, Call, current_stream_of
from llm_allreduce_plugin.runtime.failures import error_of, error_of_status
from llm_allreduce_plugin.runtime.health import Health
from llm_allreduce_plugin.runtime.host_watch import HostWatch
from llm_allreduce_plugin.runtime.network_wire import Packed, Raw, Wire
from llm_allreduce_plugin.transport.rail import Rail

_HALVES = {
    Algorithm.ONE_SHOT: (Algorithm.REDUCE, Algorithm.HOST_SUM),
    Algorithm.TWO_SHOT: (Algorithm.REDUCE_SCATTER, Algorithm.HOST_SUM_GATHER),
}


@dataclasses.dataclass(frozen=True)
class Between:
    """What joins this rank to those on other hosts.

    Attributes:
        rail: carries the sums.
        watch: bounds it.
        index: this rank's place on its host.
    """

    rail: Rail
    watch: HostWatch
    index: int


def join_hosts(
    group: dist.ProcessGroup,
    workspace: _C.Workspace,
    board: Board | None,
    rail: Rail,
    places: Places,
    name: str,
    config: AllReduceConfig,
) -> Between:
    """Watch what the start has connected.

    Args:
        group: through whose store ranks tell each other that they live.
        workspace: of this rank among those of its host.
        board: what those say of themselves.
        rail: what joins it to other hosts.
        places: of this rank.
        name: of the group, unlike any other's.
        config: has the deadlines.
    """
    store = store_of(group)
    clone = getattr(store, "clone", None)  # torch from some release on, and not every store
    if clone is not None and not is_on_file(store):
        with contextlib.suppress(RuntimeError):
            store = clone()
    watch = HostWatch(
        store, f"llm_allreduce/{name}", places, workspace, rail, config.timeout_s, config.first_timeout_s,
        functools.partial(error_of, workspace, board, places.members),
    )  # fmt: skip
    return Between(rail, watch, places.index)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Of a message: its elements, and the two halves.

    Attributes:
        first: element.
        sum_elements: fp32, of the sum that this rank exchanges.
        own_elements: of them that the message has: fewer in its last parts, or none.
        inside: sums inside the host.
        rest: sums the hosts.
    """

    first: int
    sum_elements: int
    own_elements: int
    inside: _C.Plan
    rest: _C.Plan


@dataclasses.dataclass(frozen=True)
class Shape:
    """What does not change between calls of one size and type.

    Attributes:
        launch: of several hosts.
        count: elements of a message.
        dtype: of them.
        ranks: of a host.
    """

    launch: Launch
    count: int
    dtype: torch.dtype
    ranks: int


def _pieces(workspace: _C.Workspace, shape: Shape, index: int) -> list[_Piece]:
    """``index``: of this rank's part."""
    launch, count, dtype, ranks = shape.launch, shape.count, shape.dtype, shape.ranks
    halves: dict[int, tuple[_C.Plan, _C.Plan]] = {}
    found = []
    parts = ranks if launch.algorithm is Algorithm.TWO_SHOT else 1
    for first, elements in network.cuts(count, launch.pieces):
        if elements not in halves:
            inside, rest = (
                _C.Plan(
                    workspace,
                    algorithm=int(algorithm),
                    exchange=int(launch.exchange),
                    count=elements,
                    dtype=DTYPE_CODES[dtype],
                    lanes=launch.lanes,
                    threads=launch.threads,
                    chunk_vectors=launch.chunk_vectors,
                    hosts=hosts,
                )
                for algorithm, hosts in zip(_HALVES[launch.algorithm], (0, launch.hosts), strict=True)
            )
            halves[elements] = inside, rest
        of_part = _C.sum_elements(elements, parts)
        own = max(0, min(of_part, elements - of_part * (index if parts > 1 else 0)))
        found.append(_Piece(first, of_part, own, *halves[elements]))
    return found


@dataclasses.dataclass(frozen=True)
class _Travelling:
    """A piece of which this rank's sums are on their way to other hosts.

    Attributes:
        piece: of the message.
        mine: what is sent, which must live until it has been.
        gathered: of all hosts.
        work: of torch.
        began_s: when.
    """

    piece: _Piece
    mine: torch.Tensor
    gathered: torch.Tensor
    work: dist.Work
    began_s: float


def _set_out(between: Between, piece: _Piece, mine: torch.Tensor, hosts: int) -> _Travelling:
    """Send what this rank has of a piece to ranks of equal place, and theirs here.

    Raises:
        PeerTimeoutError: it cannot be sent; naming who is behind it where that is known.
    """
    gathered = torch.empty(hosts * mine.numel(), dtype=mine.dtype, device=mine.device)
    began_s, watch = time.monotonic(), between.watch
    try:
        return _Travelling(piece, mine, gathered, between.rail.start(gathered, mine, watch.limit_s), began_s)
    except RuntimeError as error:
        raise watch.failed(began_s, str(error)) from error


def _arrive(between: Between, travelling: _Travelling) -> None:
    """Wait for it: on a GPU its stream does.

    Raises:
        PeerTimeoutError: it has not come.
    """
    watch = between.watch
    try:
        between.rail.wait(travelling.work, watch.limit_s, watch.raise_error)
    except RuntimeError as error:
        raise watch.failed(travelling.began_s, str(error)) from error
    except BaseException:  # a signal's handler may raise anything
        if watch.error is None:
            watch.leave()
        raise


def network_call(
    shape: Shape, workspace: _C.Workspace, between: Between, health: Health, device: torch.device, name: str
) -> Call:
    """A function that runs messages of this shape over several hosts.

    All pieces are summed inside the host, and begin to travel, before the first is summed over hosts: the network and
    the host's links work at the same time. On one stream; NCCL's own comes in between by events, in graphs too.

    Args:
        shape: of the messages.
        workspace: of this rank among those of its host.
        between: what joins it to other hosts.
        health: of the group.
        device: this rank's.
        name: of the strategy, for errors.
    """
    pieces, hosts, is_empty = _pieces(workspace, shape, between.index), shape.launch.hosts, shape.count == 0
    format_ = shape.launch.wire_format
    wire: Wire = Raw() if format_ is None else Packed.of(format_, hosts, device)
    current_stream, index, size = current_stream_of(device), device.index, shape.dtype.itemsize
    capturing = torch.cuda.is_current_stream_capturing if device.type == "cuda" else bool

    def check(status: int) -> None:
        if status == 0:
            return
        if status not in (_C.STATUS_CLOSED, _C.STATUS_BUSY):
            health.raise_error()
        raise error_of_status(status, name)

    def run(input_: torch.Tensor) -> torch.Tensor:
        # Kernels see the elements in logical order, so that ranks agree whatever their strides.
        source = input_.contiguous()
        output = torch.empty_like(source)
        if is_empty:
            return output if input_.is_contiguous() else torch.empty_like(input_)
        from_, to, stream = source.data_ptr(), output.data_ptr(), current_stream(index)
        if capturing():
            between.watch.note_capture()
        under_way: list[_Travelling] = []
        for piece in pieces:
            sums = torch.empty(piece.sum_elements, dtype=torch.float32, device=device)
            check(piece.inside(from_ + piece.first * size, sums.data_ptr(), stream))
            under_way.append(_set_out(between, piece, wire.pack(sums, piece.own_elements), hosts))
        for travelling in under_way:
            _arrive(between, travelling)
            piece = travelling.piece
            sums = wire.unpack(travelling.gathered, piece.own_elements, piece.sum_elements)
            check(piece.rest(sums.data_ptr(), to + piece.first * size, stream))
        return output if source is input_ or input_.is_contiguous() else torch.empty_like(input_).copy_(output)

    return run
