"""The setting ``check_calls``: ranks compare every call before it runs, and the first difference gets a name.

Ranks that pass different sizes wait for what nobody sends, or sum what does not belong together. A call that differs is
not made, on any rank.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

from llm_allreduce_plugin.algorithms.decision import Decision, FusedDecision, Launch
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import PeerTimeoutError, RankMismatchError, StartTimeoutError, ranks_text, ranks_with

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Description:
    """What must be equal on every rank: size and type of the message, whether it is captured, and what runs."""

    message: str
    captured: bool
    runs: str


def describe(decision: Decision, count: int, dtype: str, place: str, *, captured: bool) -> Description:
    """Of one call. ``place``: where the input lies, if peers read it in place."""
    return Description(f"{count} {dtype}{place}", captured, _in_words(str(decision.strategy), decision.launch))


def describe_fused(decision: FusedDecision, message: str, *, captured: bool) -> Description:
    """Of one call with a norm behind it. ``message``: the rows, and what becomes of them."""
    launch = decision.launch or decision.all_reduce.launch
    return Description(message, captured, _in_words(decision.counted_as, launch))


def _in_words(name: str, launch: Launch | None) -> str:
    return name if launch is None else f"{name} ({launch})"


def difference(number: int, found: list[Description]) -> str | None:
    """How ranks' descriptions of a call differ: "call 37: rank 0 passes 100 bfloat16, rank 1 200 bfloat16"."""
    for verb, values in (
        ("pass", [call.message for call in found]),
        ("make", ["a call that is captured" if call.captured else "an eager call" for call in found]),
        ("run", [call.runs for call in found]),
    ):
        if len(set(values)) > 1:
            return f"call {number}: {_by_value(verb, values)}"
    return None


def _by_value(verb: str, values: list[str]) -> str:
    (first, ranks), *others = ranks_with(values).items()
    does = verb if len(ranks) > 1 else f"{verb}{'es' if verb == 'pass' else 's'}"
    return ", ".join([f"{ranks_text(ranks)} {does} {first}", *(f"{ranks_text(who)} {what}" for what, who in others)])


class CallChecker:
    """Compares the calls of one communicator, in order.

    Args:
        group: whose store carries the descriptions.
        timeout_s: how long a rank waits for the others' next call.
        first_timeout_s: the same for the first.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float, first_timeout_s: float) -> None:
        first_s = max(timeout_s, first_timeout_s)
        self._agreement = Agreement(group, first_s, setting="check_calls", when="before a call")
        self._timeout_s = timeout_s
        self._calls = 0

    def check(self, call: Description) -> None:
        """Compare the next call. Collective.

        Raises:
            RankMismatchError: on every rank alike, when ranks are about to make different calls.
            PeerTimeoutError: a rank did not come to its next call in time.
        """
        self._calls += 1
        began = time.monotonic()
        try:
            found: list[Description] = self._agreement.gather(call, f"to compare call {self._calls}")
        except StartTimeoutError as error:
            peer = error.missing[0] if error.missing else -1
            waited_s = time.monotonic() - began
            said = str(error)
            raise PeerTimeoutError(self._agreement.rank, peer, "", "check_calls", waited_s, text=said) from error
        self._agreement.wait_s = self._timeout_s
        if (text := difference(self._calls, found)) is not None:
            message = f"{text}. Every rank must make the same calls in the same order (check_calls)"
            raise RankMismatchError(message)

    def around(
        self, run: Callable[_Arguments, _Result], describe_call: Callable[[bool], Description], *, on_gpu: bool
    ) -> Callable[_Arguments, _Result]:
        """``run``, compared before it runs. ``describe_call``: of it, captured or not."""
        check = self.check
        capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing if on_gpu else bool

        def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            check(describe_call(capturing()))
            return run(*args, **kwargs)

        return checked

    def close(self) -> None:
        """No further calls."""
        self._agreement.close()
