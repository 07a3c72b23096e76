"""explain and check on real GPUs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llm_allreduce_plugin import AllReduceConfig, NodeTopology
from llm_allreduce_plugin.algorithms.decision import Decision
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.config import TransportChoice
from llm_allreduce_plugin.diagnosis.proof import Task, run
from llm_allreduce_plugin.group.capabilities import group_facts
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.selection.policy import decide
from tests.conftest import PoolFor
from tests.support import checks

pytestmark = pytest.mark.gpu(2)

SIZES = tuple(1 << power for power in range(4, 29, 3))


def _explained(context: RankContext, strategy: str, settings: dict[str, Any]) -> tuple[GroupFacts, list[Decision]]:
    with checks.communicator(context, strategy, **settings) as group:
        return group.facts, [group.explain((size // 2,), torch.bfloat16) for size in SIZES]


@pytest.mark.parametrize("transport", ("auto", "host"))
@pytest.mark.parametrize("strategy", ("AUTO", "LOWPRECISION"))
def test_explain_makes_the_communicators_decisions(gpu_pool: PoolFor, transport: str, strategy: str) -> None:
    """From NVML and the driver alone, launches included: every multiprocessor was counted."""
    settings = {"transport": transport, "tuning_profile": "none"}
    config = AllReduceConfig(allreduce_strategy=strategy, **settings)
    topology = NodeTopology.detect()
    assert topology.gpus[0].multiprocessors == torch.cuda.get_device_properties(0).multi_processor_count
    facts = group_facts(topology, 2, config)
    expected = [decide(config, facts, size // 2, "bfloat16") for size in SIZES]
    for theirs, decisions in gpu_pool(2).run(_explained, strategy, settings):
        assert theirs == facts
        assert decisions == expected


@pytest.mark.parametrize("transport", (TransportChoice.PEER, TransportChoice.HOST))
def test_ranks_of_check_prove_both_kinds_of_memory(transport: TransportChoice) -> None:
    if transport is TransportChoice.PEER and NodeTopology.detect().p2p_fault((0, 1)) is not None:
        pytest.skip("no peer access here")
    found = run(Task("cuda", 2, transport))
    assert found.outcome == "proved", found.text


def test_check_passes_on_this_node() -> None:
    result = CliRunner().invoke(app, ["check", "--json"])
    document = json.loads(result.output)
    failed = [row for row in document["findings"] if row["verdict"] == "FAIL"]
    assert failed == []
    assert result.exit_code == 0
    assert any("summed to the bit" in row["text"] for row in document["findings"])
