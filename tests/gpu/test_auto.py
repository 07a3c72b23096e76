"""AUTO with a profile on GPUs: the same bits whatever it chooses, and one kernel for eager and captured calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.profiles import file as profiles
from llm_allreduce_plugin.selection.policy import describe
from llm_allreduce_plugin.topology import NodeIdentity, NodeTopology
from llm_allreduce_plugin.topology.links import TopologyClass, Transport
from tests.conftest import PoolFor
from tests.support import checks, norm_checks
from tests.support.profiles import CHANGING, entry, fused
from tests.support.reference import assert_same_bits, rank_input, rank_ordered_sum

pytestmark = pytest.mark.gpu(2)

WORLD_SIZE = 2
TRANSPORTS = pytest.mark.parametrize("transport", (Transport.SYMMETRIC, Transport.HOST), ids=str)


def _profile(folder: Path, transport: Transport, **ranges: Any) -> dict[str, Any]:
    """Settings with a made-up profile for two GPUs of this node."""
    node = NodeIdentity.of_gpus(NodeTopology.detect(), torch.cuda.get_device_name(0))
    path = folder / "profile.json"
    fields = {"world_size": WORLD_SIZE, "transport": transport, "topology_class": TopologyClass.UNKNOWN}
    profiles.store(path, node, [entry(**fields, **ranges)])
    return {"tuning_profile": str(path), "transport": "host" if transport is Transport.HOST else "peer"}


@TRANSPORTS
def test_a_row_is_the_same_in_every_batch(gpu_pool: PoolFor, tmp_path: Path, transport: Transport) -> None:
    settings = _profile(tmp_path, transport, graph=CHANGING, eager=CHANGING)
    for strategies in gpu_pool(WORLD_SIZE).run(checks.check_batches, 24, settings):
        assert strategies == ["ONESHOT", "TWOSHOT"] * 3


@TRANSPORTS
def test_a_normed_row_is_the_same_in_one_kernel_and_in_two(
    gpu_pool: PoolFor, tmp_path: Path, transport: Transport
) -> None:
    """As the profile says for each size."""
    settings = _profile(tmp_path, transport, graph=[(None, "ONESHOT")], fused=fused(norm_checks.limits_of_batches(64)))
    one, two = "ONESHOT (fused norm)", "ONESHOT, then norm"
    for runs in gpu_pool(WORLD_SIZE).run(norm_checks.runs_of_batches, 64, settings):
        assert runs == [one, one, two, two, two, one, one, two, two, two]  # by norm_checks.BATCHES


def _eager_and_captured(context: RankContext, settings: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    seed, size = context.shared_seed(), 3000
    with checks.communicator(context, "AUTO", **settings) as group:
        static = torch.zeros(size, dtype=torch.bfloat16, device=context.device)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        group.all_reduce(static)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            output = group.all_reduce(static)
        for turn in range(20):
            inputs = [rank_input(seed + turn, rank, size, torch.bfloat16) for rank in range(context.world_size)]
            static.copy_(inputs[context.rank])
            if turn % 2:
                output.fill_(float("nan"))
                graph.replay()
                answer = output
            else:
                answer = group.all_reduce(static)
            assert_same_bits(answer, rank_ordered_sum(inputs), f"turn {turn}")
        assert describe(group.config, group.facts) == group.report()["sizes"]
        # The strategies' own calls, as tuning compares them, in the same workspace.
        for strategy in ("ONESHOT", "TWOSHOT"):
            assert_same_bits(group.call_of(strategy, size, static.dtype)(static), rank_ordered_sum(inputs), strategy)
        report = group.report()
        context.gather(None)
        return report["calls"], report["captured"]


@TRANSPORTS
def test_eager_and_captured_calls_run_the_same(gpu_pool: PoolFor, tmp_path: Path, transport: Transport) -> None:
    settings = _profile(tmp_path, transport, graph=[(None, "TWOSHOT")], eager=[(None, "ONESHOT")])
    for calls, captured in gpu_pool(WORLD_SIZE).run(_eager_and_captured, settings):
        assert calls == {"ONESHOT": 1, "TWOSHOT": 12}, "by the times in graphs, but for the strategy's own call"
        assert captured == {"TWOSHOT": 1}
