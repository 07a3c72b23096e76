"""The policy: which strategy runs for a message. Pure functions, so every rank reaches the same answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llm_allreduce_plugin.algorithms import fused, measured, staging, tables
from llm_allreduce_plugin.algorithms.base import Message, Numerics
from llm_allreduce_plugin.algorithms.decision import Decision, Exchange, FusedDecision, PassedOver
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.algorithms.ranges import Table, bytes_in_words
from llm_allreduce_plugin.algorithms.strategies import ASKED_FOR, STRATEGIES, Strategy, TableStrategy
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.quantization import QuantKind, check_hidden


def _by_table(config: AllReduceConfig) -> TableStrategy | None:
    """The first strategy that goes by a table, of the one that is asked for and those that are tried instead."""
    asked = ASKED_FOR[config.allreduce_strategy]
    chain = (asked, *(STRATEGIES[name] for name in asked.instead))
    return next((strategy for strategy in chain if isinstance(strategy, TableStrategy)), None)


def uses_table(config: AllReduceConfig) -> bool:
    """Whether any message may go where a table says: then it matters which table there is."""
    return _by_table(config) is not None


def table_of(config: AllReduceConfig, facts: GroupFacts, element_bytes: int = 2) -> Table:
    """The table that messages go by, and where it comes from; without :func:`uses_table`, what they would go by."""
    strategy = _by_table(config)
    return tables.table_of(facts, element_bytes) if strategy is None else strategy.table(config, facts, element_bytes)


def decide(
    config: AllReduceConfig,
    facts: GroupFacts,
    count: int,
    dtype: str,
    *,
    readable_in_place: bool = False,
    registered_output: bool | None = None,
) -> Decision:
    """What runs for a message of ``count`` elements of ``dtype`` (as torch spells it, e.g. ``"bfloat16"``).

    Total: NCCL can always run, so there is a decision for every input. It is the same whether the call goes into a CUDA
    graph or is made at once: ranks need not do so alike.

    ``readable_in_place``: on every rank the input lies, from a multiple of 16 bytes on, in memory that peers see.
    ``registered_output``: on every rank the output lies, from a multiple of 16 bytes on, in registered memory; None:
    it is the communicator's own, which takes it from there where there is such memory.
    """
    message = Message(count, dtype, ELEMENT_BYTES.get(dtype, 0), readable_in_place, registered_output)
    requested = config.allreduce_strategy
    asked = ASKED_FOR[requested]
    against: dict[AllReduceStrategy, str] = {}
    can_run = True  # all that was tried before
    for name in (*asked.candidates(config, facts, message), *asked.instead):
        strategy = STRATEGIES[name]
        if (obstacle := strategy.obstacle(config, facts, message)) is not None:
            against.setdefault(name, obstacle)
            can_run = False
            continue
        if not (merit := strategy.pays(config, facts, message)).pays:
            against.setdefault(name, merit.reason)
            continue
        if against:
            why = "; ".join(dict.fromkeys(against.values()))
        elif name is requested:
            why = "; ".join(filter(None, [f"allreduce_strategy is {name}", merit.reason]))
        else:
            why = asked.pays(config, facts, message).reason
        launch = strategy.plan(config, facts, message)
        algorithm, why_so = strategy.describe(config, facts, launch)
        in_switch = launch is not None and launch.exchange is Exchange.IN_SWITCH
        return Decision(
            requested=requested,
            strategy=name,
            algorithm=algorithm,
            launch=launch,
            reason=f"{why}; {why_so}" if why_so else why,
            passed_over=_passed_over(config, facts, message, name, why, against),
            by_design=bool(against) and can_run,
            numerics=str(Numerics.IN_SWITCH if in_switch else strategy.numerics_of(facts)),
        )
    raise AssertionError(requested)  # NCCL, the last candidate of every chain, has no obstacle


def _passed_over(
    config: AllReduceConfig,
    facts: GroupFacts,
    message: Message,
    chosen: AllReduceStrategy,
    why: str,
    against: dict[AllReduceStrategy, str],
) -> tuple[PassedOver, ...]:
    """Every strategy but the chosen one, those that were tried first."""
    requested = config.allreduce_strategy
    asked = ASKED_FOR[requested]
    reasons = dict(against)
    for name, strategy in STRATEGIES.items():
        if name is chosen or name in reasons:
            continue
        if (obstacle := strategy.obstacle(config, facts, message)) is not None:
            reasons[name] = obstacle
        elif requested not in STRATEGIES and strategy.numerics is Numerics.LOSSY:
            reasons[name] = f"{requested} never compresses"
        elif not (merit := strategy.pays(config, facts, message)).pays:
            reasons[name] = merit.reason
        elif strategy.numerics is Numerics.ENGINE:
            reasons[name] = "a kernel of this package can run"
        elif requested not in STRATEGIES and isinstance(asked, TableStrategy):
            reasons[name] = _not_by_table(config, asked, strategy, why)
        else:
            reasons[name] = f"allreduce_strategy is {requested}"
    return tuple(PassedOver(name, reason) for name, reason in reasons.items())


def _not_by_table(config: AllReduceConfig, asked: TableStrategy, other: Strategy, why: str) -> str:
    """Why ``asked``, which runs nothing under its own name, has not chosen an exact one. ``why``: of its choice."""
    if other.name in asked.among:
        return why
    if isinstance(other, TableStrategy):
        return f"it runs the same kernels as {asked.name}"
    if other.name is not AllReduceStrategy.UB:
        return f"{asked.name} does not choose it"
    if config.one_shot_max_bytes is not None:
        return "one_shot_max_bytes chooses between one step and two"
    return "results stored into registered outputs were not measured to be faster"


def decide_fused(
    config: AllReduceConfig,
    facts: GroupFacts,
    rows: int,
    hidden: int,
    dtype: str,
    quant: QuantKind | None = None,
    *,
    however_slow: bool = False,
) -> FusedDecision:
    """What runs for ``rows`` rows of ``hidden`` elements with residual, RMSNorm and quantization behind the sum.

    For all hidden sizes that can be normed there is a decision. The result has the same bits whatever it says.

    ``however_slow``: one kernel wherever it can run, whether or not it pays, which is what tuning finds out.

    Raises:
        ValueError: rows of this size cannot be normed, or not quantized like this.
    """
    check_hidden(hidden, quant)
    all_reduce = decide(config, facts, rows * hidden, dtype)
    if rows == 0 or not config.fuse_norm:
        reason = "there are no rows" if rows == 0 else "fuse_norm is off"
        return FusedDecision(None, reason, all_reduce, by_design=True)
    if all_reduce.launch is None:
        return FusedDecision(None, "the engine's own all-reduce runs", all_reduce)
    subject = fused.Rows(Message(rows * hidden, dtype, ELEMENT_BYTES[dtype]), rows, hidden)
    carrier = fused.carrier(config, facts, subject.message, all_reduce.launch)
    if (obstacle := fused.obstacle(facts, subject, carrier)) is not None:
        return FusedDecision(None, obstacle, all_reduce)
    merit = fused.pays(facts, subject, carrier)
    if not merit.pays and not however_slow:
        return FusedDecision(None, merit.reason, all_reduce, by_design=True)
    return FusedDecision(fused.plan(facts, subject, carrier), merit.reason, all_reduce, quant=quant)


def kernel_in_words(decision: Decision) -> str | None:
    """The algorithm of an exact kernel, where the strategy's name does not say it: that has several to choose from."""
    chooses = isinstance(STRATEGIES[decision.strategy], TableStrategy)
    return decision.launch.algorithm.in_words if decision.launch is not None and chooses else None


class _SizeRange(Protocol):
    """Messages up to ``max_bytes`` (None: all larger ones) run on ``strategy``."""

    @property
    def max_bytes(self) -> int | None: ...

    @property
    def strategy(self) -> str: ...


def describe_ranges(ranges: Sequence[_SizeRange]) -> str:
    """``ONESHOT to 256 KiB, then TWOSHOT``."""
    parts = [
        f"{found.strategy} to {bytes_in_words(found.max_bytes)}" for found in ranges if found.max_bytes is not None
    ]
    last = ranges[-1].strategy
    return ", ".join([*parts, f"then {last}"]) if parts else f"{last} at every size"


def describe(config: AllReduceConfig, facts: GroupFacts, dtype: str = "bfloat16") -> str:
    """What runs at which sizes, for a line in the log: ``ONESHOT to 256 KiB, then TWOSHOT``."""
    element = ELEMENT_BYTES[dtype]
    steps: list[tuple[int, str]] = []
    largest = 1 << 30
    registered = tables.registered_table_of(facts, element)
    ranges = (*table_of(config, facts, element).ranges, *(registered.ranges if registered else ()))
    limits = {min(found.max_bytes, largest) for found in ranges if found.max_bytes}
    if staging.refusal(config, facts) is None:
        limits.add(facts.world_size * measured.STAGED_ABOVE_STAGE_BYTES)
    for size in sorted({1 << power for power in range(4, 31)} | limits):
        decision = decide(config, facts, size // element, dtype)
        what = kernel_in_words(decision) or str(decision.strategy)
        if decision.launch is not None and decision.launch.staged:
            what += " in stages"
        if steps and steps[-1][1] == what:
            steps[-1] = (size, what)
        else:
            steps.append((size, what))
    parts = [f"{what} to {bytes_in_words(size)}" for size, what in steps[:-1]]
    last = steps[-1][1]
    parts.append(f"then {last}" if parts else f"{last} at every size")
    return ", ".join(parts)
