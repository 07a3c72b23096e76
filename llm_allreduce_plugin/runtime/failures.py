"""Why a group cannot be used again: from the record that a call has left, and what ranks say of themselves."""

from __future__ import annotations

import time
from collections.abc import Sequence

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Algorithm, Epilogue
from llm_allreduce_plugin.algorithms.facts import DTYPE_CODES
from llm_allreduce_plugin.errors import AllReduceError, GroupBrokenError, PeerTimeoutError, RankMismatchError
from llm_allreduce_plugin.group.board import Board, Row, State
from llm_allreduce_plugin.wire import PACKETS

DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
WIRE_FORMATS = {packet.code: wire for wire, packet in PACKETS.items()}
_EXACT = {int(algorithm): algorithm.name.replace("_", "") for algorithm in Algorithm}
PHASES = {0: "gather", 1: "scatter", 2: "exchange", 3: "output"}


# Algorithm, exchange, wire format and epilogue of a call, as the library numbers them.
Kind = tuple[int, int, int, int]


def name_of_kind(kind: Kind) -> str:
    """The strategy that makes calls of a kind."""
    algorithm, _exchange, wire, _epilogue = kind
    return _EXACT.get(algorithm, "LOWPRECISION") if wire == _C.WIRE_RAW else "LOWPRECISION"


def _made(call: tuple[Kind, int, int]) -> str:
    kind, dtype, count = call
    wire = f" as {WIRE_FORMATS[kind[2]]}" if kind[2] in WIRE_FORMATS else ""
    norm = ", with a norm" if kind[3] == Epilogue.RMS_NORM else ""
    return f"{count} {DTYPES.get(dtype, dtype)} ({name_of_kind(kind)}{wire}{norm})"


def named(rank: int, ranks: Sequence[int]) -> int:
    """A rank as the group numbers it. ``ranks``: of each that shares the workspace; empty: those are all."""
    return ranks[rank] if ranks and 0 <= rank < len(ranks) else rank


def breakage_of(workspace: _C.Workspace, ranks: Sequence[int] = ()) -> AllReduceError | None:
    """The error for what has broken the group; None while it works, or when a wait has expired.

    ``ranks``: see :func:`named`.

    Returns:
        RankMismatchError: a peer makes another call (CPU ranks; on GPUs ``check_calls`` finds that).
        GroupBrokenError: a call was left before its end, or something else has written to the ranks' shared memory.
    """
    record = workspace.failure()
    if record is None:
        return None
    own, other, kind, phase, _lane, expected, seen, _waited_s = record
    rank, peer = named(own, ranks), named(other, ranks)
    where = f"{name_of_kind(kind)}/{PHASES[phase]}"
    match workspace.reason():
        case _C.REASON_MISMATCH:
            mine, theirs = workspace.mismatch()
            return RankMismatchError(
                f"ranks make different calls: rank {rank} passes {_made(mine)}, rank {peer} {_made(theirs)}. "
                "Every rank must make the same calls in the same order; this group cannot be used again"
            )
        case _C.REASON_OVERWRITTEN:
            return GroupBrokenError(
                f"rank {rank} read a count of rank {peer} in {where} that is {(seen - expected) % (1 << 32)} rounds "
                "too high: something else has written to their shared memory. Restart the group"
            )
        case _C.REASON_INTERRUPTED:
            return GroupBrokenError(
                f"rank {rank} left the call {where} before it had ended: a signal handler raised, or the communicator "
                "was closed. Ranks no longer agree on how many calls they have made; restart the group"
            )
        case _C.REASON_EXCHANGE:
            return GroupBrokenError(
                f"rank {rank} left an exchange between hosts before its end. Ranks no longer agree on how many calls "
                "they have made; restart the group"
            )
    return None


def failure_of(
    workspace: _C.Workspace, board: Board | None = None, ranks: Sequence[int] = ()
) -> PeerTimeoutError | None:
    """The expired wait on record, or None. Cheap, and safe after the CUDA context has broken.

    ``board``: where ranks say what has become of them, for a text that says why the peer did not come. ``ranks``: see
    :func:`named`.
    """
    record = workspace.failure()
    if record is None:
        return None
    own, other, kind, phase, _lane, _expected, _seen, waited_s = record
    rank, peer = named(own, ranks), named(other, ranks)
    where = name_of_kind(kind), PHASES[phase]
    row = None if board is None else board.row(other)
    if board is None or row is None:
        return PeerTimeoutError(rank, peer, *where, waited_s)
    if row.state is State.GAVE_UP:
        ago = max(0.0, time.time() - row.wall_s)
        gave_up_in = f"{name_of_kind((row.algorithm, 0, row.wire, Epilogue.STORE))}/{PHASES.get(row.phase)}"
        before = f"{row.waited_s:.3g} s for rank {named(row.peer, ranks)} in {gave_up_in}"
        if row.peer == own and _is_later(board, own, row):
            text = f"rank {rank} came too late: rank {peer} gave up {ago:.3g} s ago, after it had waited {before}"
            return PeerTimeoutError(rank, peer, *where, waited_s, text=text)
        return PeerTimeoutError(
            rank, peer, *where, waited_s, known=f", which gave up {ago:.3g} s ago, after it had waited {before}"
        )
    if row.state is State.BROKEN:
        return PeerTimeoutError(rank, peer, *where, waited_s, known=", which could not go on: see its log")
    if row.state is State.CLOSED:
        return PeerTimeoutError(rank, peer, *where, waited_s, known=", which has closed its communicator")
    known = ", whose process has ended" if board.has_ended(other) else ""
    return PeerTimeoutError(rank, peer, *where, waited_s, known=known)


def _is_later(board: Board, rank: int, theirs: Row) -> bool:
    """Whether this rank has given up after another had, if at all."""
    own = board.row(rank)
    return own is None or own.state is not State.GAVE_UP or own.wall_s > theirs.wall_s


def error_of(workspace: _C.Workspace, board: Board | None = None, ranks: Sequence[int] = ()) -> AllReduceError | None:
    """What has broken the group, or None. Cheap, and safe after the CUDA context has broken.

    ``board``: see :func:`failure_of`; ``ranks``: :func:`named`.
    """
    return breakage_of(workspace, ranks) or failure_of(workspace, board, ranks)


def error_of_status(status: int, name: str) -> RuntimeError:
    """The error for a call that was refused, in the thread that made it. ``name``: of the strategy."""
    if status == _C.STATUS_CLOSED:
        return RuntimeError("this communicator is closed")
    if status == _C.STATUS_BUSY:
        return RuntimeError(
            "another thread is inside a call of this communicator: make calls one after the other, on every rank in "
            "the same order"
        )
    why = f" ({_C.refusal()})" if status == _C.STATUS_INVALID_ARGUMENT else ""
    return RuntimeError(f"{name}: {_C.error_string(status)}{why}")
