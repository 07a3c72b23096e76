"""The proof over hosts: ranks that torchrun has started, one to a GPU, sum real bytes, and say what joins them.

Every rank takes the same steps and comes to the same findings. The whole of it has a deadline: a network that hangs
NCCL hangs a thread, and the ranks end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_allreduce_plugin.base.attempt import Attempt
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, load_config
from llm_allreduce_plugin.diagnosis.finding import Finding, fail, ok, warn
from llm_allreduce_plugin.diagnosis.proof import COUNTS, DTYPE, WAIT_S
from llm_allreduce_plugin.measure.torchrun import TIMEOUT_S, Place, joined

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.facts import GroupFacts
    from llm_allreduce_plugin.measure.ranks import RankContext
    from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator

NAME, DOMAIN, SUMS = "hosts", "NVLink domain", "sums"


def findings(place: Place, *, timeout_s: float = TIMEOUT_S) -> tuple[list[Finding], bool]:
    """What the group of these ranks comes to, within ``timeout_s``. Collective.

    Returns:
        The same findings on every rank; and whether something hangs, so that this process cannot end by itself.
    """
    steps = ["loading torch"]
    attempt = Attempt(lambda: _look(place, steps), "check")
    if not attempt.wait(timeout_s):
        text = f"rank {place.rank} had no answer within {timeout_s:g} s; the last step was: {steps[-1]}"
        advice = "look at the logs of the other ranks; NCCL_DEBUG=INFO says which network NCCL takes"
        return [fail(SUMS, text, advice)], True
    try:
        return attempt.result(), False
    except Exception as error:  # noqa: BLE001  (whatever this network does: a diagnosis must not need one itself)
        text = f"rank {place.rank}, {steps[-1]}: {type(error).__name__}: {' '.join(str(error).split())}"
        return [fail(SUMS, text, "see the logs of the other ranks")], False


def _look(place: Place, steps: list[str]) -> list[Finding]:
    import torch

    from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator

    with joined(place, steps.append, on_gpu=torch.cuda.is_available()) as context:
        steps.append("starting a group")
        given = {"allreduce_strategy": AllReduceStrategy.MINLATENCY, "timeout_s": WAIT_S}
        config: AllReduceConfig = load_config(given, engine_name="llm-allreduce check")
        group = TensorParallelCommunicator(context.group, context.device, config, control_group=context.control_group)
        try:
            steps.append("summing")
            wrong = max(context.gather(sum(_wrong(context, group, count) for count in COUNTS)))
            reason = group.explain((COUNTS[0],), getattr(torch, DTYPE)).reason
            return [*of_hosts(group.facts), of_sums(group.facts, wrong, reason)]
        finally:
            group.close()


def _wrong(context: RankContext, group: TensorParallelCommunicator, count: int) -> int:
    """Elements of a sum that are not what they must be."""
    import torch

    from llm_allreduce_plugin.measure.answers import make_input, wrong_elements
    from llm_allreduce_plugin.oracle.hosts import host_ordered_sum

    dtype, seed, device = getattr(torch, DTYPE), context.shared_seed(), context.device
    inputs = [make_input(seed, rank, count, dtype, device) for rank in range(context.world_size)]
    mine = inputs[context.rank]
    ours = group.explain(mine.shape, dtype).launch is not None
    expected = host_ordered_sum(inputs, group.facts.host_order)
    return wrong_elements(group.all_reduce(mine), expected, exact=ours, world_size=context.world_size)


def of_hosts(facts: GroupFacts) -> list[Finding]:
    """On how many hosts ranks are, and what joins them."""
    hosts = sorted(set(facts.hosts))
    each = [facts.hosts.count(host) for host in hosts]
    text = f"{facts.world_size} ranks on {len(hosts)} host{'s' * (len(hosts) != 1)} ({', '.join(map(str, each))})"
    if len(hosts) == 1:
        return [ok(NAME, text)]
    if len(set(each)) > 1:
        found = warn(NAME, text, "as many ranks on each host: kernels over a network need that")
    else:
        found = ok(NAME, text)
    if facts.fabric:
        return [found, ok(DOMAIN, f"proved: memory of all {facts.world_size} ranks was written and read by all")]
    advice = "nothing, where a network joins the hosts; in a rack of one domain see docs/several_hosts.md"
    return [found, warn(DOMAIN, facts.no_fabric_reason, advice)]


def of_sums(facts: GroupFacts, wrong: int, reason: str) -> Finding:
    """Whether sums are right, and whose they are. ``wrong``: elements; ``reason``: why this kernel, or none, ran."""
    if wrong:
        return fail(SUMS, f"{wrong} elements are wrong", "allreduce_strategy NCCL runs none of our kernels")
    if facts.no_transport_reason:
        return warn(SUMS, f"right, by the engine's own all-reduce: {facts.no_transport_reason}", "see above")
    return ok(SUMS, f"{facts.world_size} ranks summed to the bit: {reason}")
