"""GPUs as hosts of one NVLink domain: the probe, and the real kernels over memory that only handles have brought."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch

from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.oracle.hosts import host_ordered_sum
from llm_allreduce_plugin.transport.fabric import FabricMemory
from tests.conftest import PoolFor
from tests.support import checks
from tests.support.fabric_ranks import ONE_DOMAIN, fabric_of, placed
from tests.support.fd_fabric import FdEntryPoints
from tests.support.reference import DTYPES, SIZES, assert_same_bits, rank_input, rank_ordered_sum

pytestmark = pytest.mark.gpu(2, per_rank=True)

WORLD_SIZES = (2, 4)
STRATEGIES = ("MNNVL", "AUTO", "ONESHOT", "TWOSHOT", "MINLATENCY")


def _over_a_domain(context: RankContext, check: Any, *arguments: Any) -> Any:
    """A check whose communicators span two hosts."""
    size = context.world_size
    hosts = [rank * 2 // size for rank in range(size)]
    with placed(context.rank, hosts, [ONE_DOMAIN] * size), fabric_of(FdEntryPoints()) as asked:
        answer = check(context, *arguments)
    assert asked, "nothing was opened over the domain"
    return answer


def _facts(context: RankContext, strategy: str) -> None:
    with checks.communicator(context, strategy) as group:
        assert group.facts.fabric
        assert len(set(group.facts.hosts)) == 2
        assert isinstance(group._held.memory, FabricMemory)
        assert group.explain((4096,), torch.bfloat16).launch is not None


def _comes_and_goes(context: RankContext, strategy: str) -> None:
    """Measured when nothing is handed out any more: a file that a peer could still ask for holds the memory, too."""
    context.communicator(strategy).close()  # kernels are loaded, and stay
    context.gather(None)
    before = torch.cuda.mem_get_info(context.device)[0]
    context.gather(None)
    _over_a_domain(context, _facts, strategy)
    context.gather(None)
    deadline = time.monotonic() + 10
    while (left := before - torch.cuda.mem_get_info(context.device)[0]) >= 64 << 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    context.gather(None)
    assert left < 64 << 20, f"{left >> 20} MiB are gone, of workspaces of 96 or 192 MiB"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_on_two_hosts_form_one_group(gpu_pool: PoolFor, world_size: int, strategy: str) -> None:
    gpu_pool(world_size).run(_comes_and_goes, strategy)


def _real_driver(context: RankContext) -> tuple[bool, str, str]:
    """Nothing is in the driver's place. NVML's word, here a table's, is no proof: the driver's is."""
    size, seed = context.world_size, context.shared_seed()
    hosts = [rank * 2 // size for rank in range(size)]
    began = time.monotonic()
    with placed(context.rank, hosts, [ONE_DOMAIN] * size), checks.communicator(context, "MNNVL") as group:
        took_s = time.monotonic() - began
        inputs = [rank_input(seed, rank, 70_001, torch.bfloat16) for rank in range(size)]
        output = group.all_reduce(inputs[context.rank].to(context.device))
        want = rank_ordered_sum(inputs) if group.facts.fabric else host_ordered_sum(inputs, hosts)
        assert_same_bits(output, want, f"{group.facts}, {seed=}")
        assert took_s < 120, "each step of the probe has a deadline"
        decision = group.explain((4096,), torch.bfloat16)
        return group.facts.fabric, group.facts.no_fabric_reason, str(decision.strategy)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_driver_decides(gpu_pool: PoolFor, world_size: int) -> None:
    """With fabric handles, the group runs over the domain. Without, it goes over the network, and says why."""
    answers = gpu_pool(world_size).run(_real_driver)
    assert len(set(answers)) == 1, "all ranks alike"
    over_domain, reason, strategy = answers[0]
    if over_domain:
        assert (reason, strategy) == ("", "MNNVL")
    else:
        assert re.search(r"fabric handles|cu[A-Z]\w+: CUDA_ERROR_\w+ \(\d+\)|not done after", reason), reason
        assert strategy == "MINLATENCY"


@pytest.mark.parametrize("settings", ({}, {"in_band": False}), ids=("in band", "flagged"))
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "AUTO"])  # runs under other names
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sizes(gpu_pool: PoolFor, world_size: int, dtype: torch.dtype, strategy: str, settings: dict[str, Any]) -> None:
    gpu_pool(world_size).run(_over_a_domain, checks.check_sizes, strategy, dtype, SIZES, settings)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_mixed_sequence(gpu_pool: PoolFor, world_size: int) -> None:
    gpu_pool(world_size).run(_over_a_domain, checks.check_sequence, 200, {"workspace_bytes": 4 << 20})


def _replayed(context: RankContext, strategy: str) -> None:
    with checks.communicator(context, strategy) as group:
        for count in (8192, 1 << 20):
            mine = torch.zeros(count, dtype=torch.bfloat16, device=context.device)
            group.all_reduce(mine)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = group.all_reduce(mine)
            for _ in range(3):
                seed = context.shared_seed()
                inputs = [rank_input(seed, rank, count, torch.bfloat16) for rank in range(context.world_size)]
                mine.copy_(inputs[context.rank])
                graph.replay()
                torch.cuda.synchronize(context.device)
                assert_same_bits(output, rank_ordered_sum(inputs), f"{strategy} x {count}, replayed")


@pytest.mark.parametrize("strategy", ("MNNVL", "ONESHOT", "TWOSHOT"))
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_graphs(gpu_pool: PoolFor, world_size: int, strategy: str) -> None:
    gpu_pool(world_size).run(_over_a_domain, _replayed, strategy)
