"""The policy: which strategy runs for a message. Pure functions, so every rank reaches the same answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llm_allreduce_plugin.algorithms import measured, staging, tables
from llm_allreduce_plugin.algorithms.base import Message
from llm_allreduce_plugin.algorithms.decision import Algorithm, Decision, PassedOver
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.algorithms.ranges import Range, Table
from llm_allreduce_plugin.algorithms.strategies import STRATEGIES
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy

S = AllReduceStrategy

# What is tried when a strategy cannot run. AUTO stands for the choice that AUTO would make.
_FALLBACKS: dict[AllReduceStrategy, tuple[AllReduceStrategy, ...]] = {
    S.AUTO: (S.AUTO, S.NCCL),
    S.NCCL: (S.NCCL,),
    S.ONESHOT: (S.ONESHOT, S.TWOSHOT, S.NCCL),
    S.TWOSHOT: (S.TWOSHOT, S.NCCL),
    S.MINLATENCY: (S.MINLATENCY, S.NCCL),
    S.UB: (S.UB, S.TWOSHOT, S.NCCL),
    S.LOWPRECISION: (S.LOWPRECISION, S.MINLATENCY, S.NCCL),
    S.MNNVL: (S.MNNVL, S.MINLATENCY, S.NCCL),
}


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"


def table_of(config: AllReduceConfig, facts: GroupFacts, element_bytes: int = 2) -> Table:
    """The table that AUTO, or what falls back to MINLATENCY, goes by, and where it comes from."""
    if config.one_shot_max_bytes is not None and config.allreduce_strategy is S.AUTO:
        ranges = (Range(int(config.one_shot_max_bytes), "ONESHOT"), Range(None, "TWOSHOT"))
        return Table(ranges, "one_shot_max_bytes")
    return tables.table_of(facts, element_bytes)


def uses_table(config: AllReduceConfig) -> bool:
    """Whether any message may go where a table says: then it matters which table there is."""
    return not {S.AUTO, S.MINLATENCY}.isdisjoint(_FALLBACKS[config.allreduce_strategy])


def _merit(table: Table, message: Message) -> tuple[AllReduceStrategy, str]:
    """The fastest strategy of a table for a message, and why."""
    below, found = table.range_of(message.payload_bytes)
    size = _bytes(message.payload_bytes)
    if found.max_bytes is not None:
        where = f"within {_bytes(found.max_bytes)}" + (f" and more than {_bytes(below)}" if below else "")
    else:
        where = f"more than {_bytes(below)}" if below else "like all sizes"
    first = S(found.strategy)
    steps = "one step beats two" if first is S.ONESHOT else "two steps beat one"
    return first, f"{size} are {where}, where {steps} ({table.source})"


def _auto_order(config: AllReduceConfig, facts: GroupFacts, message: Message) -> list[tuple[AllReduceStrategy, str]]:
    """AUTO's candidates, best first, each with what speaks for it. All of one numeric class."""
    table = table_of(config, facts, message.element_bytes)
    first, merit = _merit(table, message)
    second = S.TWOSHOT if first is S.ONESHOT else S.ONESHOT
    return [(first, merit), (second, f"{first} is first for {_bytes(message.payload_bytes)}")]


def decide(config: AllReduceConfig, facts: GroupFacts, count: int, dtype: str) -> Decision:
    """What runs for a message of ``count`` elements of ``dtype`` (as torch spells it, e.g. ``"bfloat16"``).

    Total: NCCL can always run, so there is a decision for every input. It is the same whether the call goes into a CUDA
    graph or is made at once: ranks need not do so alike.
    """
    message = Message(count=count, dtype=dtype, element_bytes=ELEMENT_BYTES.get(dtype, 0))
    requested = config.allreduce_strategy
    candidates: list[tuple[AllReduceStrategy, str]] = []
    for name in _FALLBACKS[requested]:
        if name is S.AUTO:
            candidates += _auto_order(config, facts, message)
        elif name is requested is S.MINLATENCY:
            _, merit = _merit(tables.table_of(facts, message.element_bytes), message)
            candidates.append((name, f"allreduce_strategy is {name}; {merit}"))
        else:
            candidates.append((name, f"allreduce_strategy is {name}"))

    against: dict[AllReduceStrategy, str] = {}
    can_run = True  # all that was tried before
    for name, merit in candidates:
        strategy = STRATEGIES[name]
        if (obstacle := strategy.obstacle(facts, message)) is not None:
            against.setdefault(name, obstacle)
            can_run = False
            continue
        if (reason := strategy.stands_back(facts, message)) is not None:
            against.setdefault(name, reason)
            continue
        fell_back = name is not requested and against
        why = "; ".join(dict.fromkeys(against.values())) if fell_back else merit
        algorithm, why_so = strategy.describe(facts)
        return Decision(
            requested=requested,
            strategy=name,
            algorithm=algorithm,
            launch=strategy.plan(facts, message),
            reason=f"{why}; {why_so}" if why_so else why,
            passed_over=_passed_over(facts, message, requested, name, why, against),
            by_design=bool(against) and can_run,
        )
    raise AssertionError(requested)  # NCCL, the last candidate of every chain, has no obstacle


def _passed_over(
    facts: GroupFacts,
    message: Message,
    requested: AllReduceStrategy,
    chosen: AllReduceStrategy,
    why: str,
    against: dict[AllReduceStrategy, str],
) -> tuple[PassedOver, ...]:
    """Every strategy but the chosen one, those that were tried first."""
    reasons = dict(against)
    for name, strategy in STRATEGIES.items():
        if name is chosen or name in reasons:
            continue
        obstacle = strategy.obstacle(facts, message) or strategy.stands_back(facts, message)
        if obstacle is not None:
            reasons[name] = obstacle
        elif name is S.NCCL:
            reasons[name] = "a kernel of this package can run"
        elif requested is S.AUTO:
            reasons[name] = why
        else:
            reasons[name] = f"allreduce_strategy is {requested}"
    return tuple(PassedOver(name, reason) for name, reason in reasons.items())


class _SizeRange(Protocol):
    """Messages up to ``max_bytes`` (None: all larger ones) run on ``strategy``."""

    @property
    def max_bytes(self) -> int | None: ...

    @property
    def strategy(self) -> str: ...


def describe_ranges(ranges: Sequence[_SizeRange]) -> str:
    """``ONESHOT to 256 KiB, then TWOSHOT``."""
    parts = [f"{found.strategy} to {_bytes(found.max_bytes)}" for found in ranges if found.max_bytes is not None]
    last = ranges[-1].strategy
    return ", ".join([*parts, f"then {last}"]) if parts else f"{last} at every size"


def describe(config: AllReduceConfig, facts: GroupFacts, dtype: str = "bfloat16") -> str:
    """What runs at which sizes, for a line in the log: ``ONESHOT to 256 KiB, then TWOSHOT``."""
    element = ELEMENT_BYTES[dtype]
    steps: list[tuple[int, str]] = []
    largest = 1 << 30
    ranges = table_of(config, facts, element).ranges
    limits = {min(found.max_bytes, largest) for found in ranges if found.max_bytes}
    if staging.obstacle(facts) is None:
        limits.add(facts.world_size * measured.STAGED_ABOVE_STAGE_BYTES)
    for size in sorted({1 << power for power in range(4, 31)} | limits):
        decision = decide(config, facts, size // element, dtype)
        what = str(decision.strategy)
        if decision.strategy is S.MINLATENCY and decision.launch is not None:
            what = {Algorithm.ONE_SHOT: "one-shot", Algorithm.TWO_SHOT: "two-shot"}[decision.launch.algorithm]
        if decision.launch is not None and decision.launch.staged:
            what += " in stages"
        if steps and steps[-1][1] == what:
            steps[-1] = (size, what)
        else:
            steps.append((size, what))
    parts = [f"{what} to {_bytes(size)}" for size, what in steps[:-1]]
    last = steps[-1][1]
    parts.append(f"then {last}" if parts else f"{last} at every size")
    return ", ".join(parts)
