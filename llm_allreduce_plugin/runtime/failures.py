"""Why a group cannot be used again, where no wait has expired: from the record that a call has left."""

from __future__ import annotations

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.errors import AllReduceError, GroupBrokenError, RankMismatchError

DTYPES = {0: "float32", 1: "float16", 2: "bfloat16"}  # by lar_dtype
ALGORITHMS = {
    _C.ONE_SHOT: "ONESHOT",
    _C.TWO_SHOT: "TWOSHOT",
    _C.TWO_SHOT_PULL: "TWOSHOT",
    _C.LOW_PRECISION: "LOWPRECISION",
    _C.LOW_PRECISION_RING: "LOWPRECISION",
    _C.LOW_PRECISION_HIERARCHICAL: "LOWPRECISION",
}
WIRE_FORMATS = {_C.WIRE_FP8: "fp8", _C.WIRE_TQ3: "tq3", _C.WIRE_HADAMARD2: "hadamard2"}
PHASES = {0: "gather", 1: "scatter", 2: "exchange"}


def _made(call: tuple[int, int, int, int]) -> str:
    algorithm, dtype, wire_format, count = call
    wire = f" as {WIRE_FORMATS[wire_format]}" if wire_format in WIRE_FORMATS else ""
    return f"{count} {DTYPES.get(dtype, dtype)} ({ALGORITHMS.get(algorithm, algorithm)}{wire})"


def breakage_of(workspace: _C.Workspace) -> AllReduceError | None:
    """The error for what has broken the group; None while it works, or when a wait has expired.

    Returns:
        RankMismatchError: a peer makes another call (CPU ranks; on GPUs ``check_calls`` finds that).
        GroupBrokenError: a call was left before its end, or something else has written to the ranks' shared memory.
    """
    record = workspace.failure()
    if record is None:
        return None
    rank, peer, algorithm, phase, _lane, expected, seen, _waited_s = record
    where = f"{ALGORITHMS[algorithm]}/{PHASES[phase]}"
    match workspace.reason():
        case _C.REASON_MISMATCH:
            mine, theirs = workspace.mismatch()
            return RankMismatchError(
                f"ranks make different calls: rank {rank} passes {_made(mine)}, rank {peer} {_made(theirs)}. "
                "Every rank must make the same calls in the same order; this group cannot be used again"
            )
        case _C.REASON_OVERWRITTEN:
            return GroupBrokenError(
                f"what rank {peer} has told rank {rank} in {where} is {(seen - expected) % (1 << 32)} rounds ahead of "
                "what it can have done: something else has written to their shared memory. Restart the group"
            )
        case _C.REASON_INTERRUPTED:
            return GroupBrokenError(
                f"rank {rank} left a call, {where}, before its end: a signal handler raised, or the communicator was "
                "closed. Ranks no longer agree on how many calls they have made; restart the group"
            )
    return None


def error_of_status(status: int, name: str) -> RuntimeError:
    """The error for a call that was refused. ``name``: of the strategy."""
    if status == _C.STATUS_CLOSED:
        return RuntimeError("this communicator is closed")
    if status == _C.STATUS_BUSY:
        return RuntimeError(
            "another thread is in a call of this communicator: its calls must follow each other, on every rank in the "
            "same order"
        )
    return RuntimeError(f"{name}: {_C.error_string(status)}")
