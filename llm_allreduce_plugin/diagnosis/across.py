"""The proof over hosts: ranks that torchrun has started, one to a GPU, sum real bytes, and say what joins them.

Every rank takes the same steps and comes to the same findings. The whole of it has a deadline: a network that hangs
NCCL hangs a thread, and the ranks end.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llm_allreduce_plugin.base.attempt import Attempt
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, load_config
from llm_allreduce_plugin.diagnosis.finding import Finding, fail, ok, warn
from llm_allreduce_plugin.diagnosis.proof import COUNTS, DTYPE, WAIT_S

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.facts import GroupFacts
    from llm_allreduce_plugin.measure.ranks import RankContext
    from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator

TIMEOUT_S = 300.0  # ranks of two hosts import torch, make contexts, and NCCL looks for its networks
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NAME, DOMAIN, SUMS = "hosts", "NVLink domain", "sums"


@dataclasses.dataclass(frozen=True)
class Place:
    """Of a rank, as torchrun says it."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """Of this process.

        Raises:
            ValueError: torchrun has not started it.
        """
        missing = [name for name in _VARIABLES if not environment.get(name)]
        if missing:
            message = (
                f"{', '.join(missing)} not set: start it on every host with torchrun, like torchrun --nnodes 2 "
                "--nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --no-python llm-allreduce check "
                "--torchrun"
            )
            raise ValueError(message)
        return cls(*(int(environment[name]) for name in _VARIABLES[:3]))


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
    import torch.distributed as dist

    from llm_allreduce_plugin.measure.ranks import RankContext
    from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    steps.append("meeting the other ranks")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        rank=place.rank,
        world_size=place.world_size,
        timeout=dt.timedelta(seconds=TIMEOUT_S),
        device_id=device if on_gpu else None,
    )
    try:
        whole = dist.group.WORLD
        assert whole is not None
        control = dist.new_group(backend="gloo") if on_gpu else whole
        context = RankContext(place.rank, place.world_size, device, whole, control)
        steps.append("starting a group")
        given = {"allreduce_strategy": AllReduceStrategy.MINLATENCY, "timeout_s": WAIT_S}
        config: AllReduceConfig = load_config(given, engine_name="llm-allreduce check")
        group = TensorParallelCommunicator(whole, device, config, control_group=control)
        try:
            steps.append("summing")
            wrong = max(context.gather(sum(_wrong(context, group, count) for count in COUNTS)))
            reason = group.explain((COUNTS[0],), getattr(torch, DTYPE)).reason
            return [*of_hosts(group.facts), of_sums(group.facts, wrong, reason)]
        finally:
            group.close()
    finally:
        dist.destroy_process_group()


def _wrong(context: RankContext, group: TensorParallelCommunicator, count: int) -> int:
    """Elements of a sum that are not what they must be."""
    import torch

    from llm_allreduce_plugin.measure.answers import make_input, wrong_elements
    from llm_allreduce_plugin.oracle.hosts import host_ordered_sum

    dtype, seed, device = getattr(torch, DTYPE), context.shared_seed(), context.device
    inputs = [make_input(seed, rank, count, dtype, device) for rank in range(context.world_size)]
    mine = inputs[context.rank]
    ours = group.explain(mine.shape, dtype).launch is not None
    expected = host_ordered_sum(inputs, order_of(group.facts))
    return wrong_elements(group.all_reduce(mine), expected, exact=ours, world_size=context.world_size)


def order_of(facts: GroupFacts) -> tuple[int, ...]:
    """The host of each rank, as sums are ordered by it: in one NVLink domain there is only one."""
    return facts.hosts if facts.crosses_network else (0,) * facts.world_size


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
