"""What explain says is what communicators do; what check proves is proved by real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig
from llm_allreduce_plugin.algorithms.decision import Decision
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.config import TransportChoice
from llm_allreduce_plugin.diagnosis.proof import Task, run
from llm_allreduce_plugin.group.capabilities import cpu_facts
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.selection.policy import decide
from tests.conftest import PoolFor
from tests.support import checks

MESSAGES = [
    (shape, dtype)
    for dtype in ("bfloat16", "float32", "int32")
    for shape in ((0,), (1,), (8, 8192), (3, 1000), (4096, 4096))
]


def _explained(context: RankContext, strategy: str, settings: dict[str, Any]) -> tuple[GroupFacts, list[Decision]]:
    with checks.communicator(context, strategy, **settings) as group:
        return group.facts, [group.explain(shape, getattr(torch, dtype)) for shape, dtype in MESSAGES]


@pytest.mark.parametrize("world_size", (2, 3))
@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("AUTO", {}),
        ("MINLATENCY", {"workspace_bytes": 8 << 20}),
        ("LOWPRECISION", {"low_precision": {"wire_format": "tq3", "min_bytes": 4096}}),
        ("UB", {}),
        ("NCCL", {}),
    ],
)
def test_explain_makes_the_communicators_decisions(
    cpu_pool: PoolFor, world_size: int, strategy: str, settings: dict[str, Any]
) -> None:
    config = AllReduceConfig(allreduce_strategy=strategy, **settings)
    facts = cpu_facts(world_size, config)
    expected = [
        decide(config, facts, torch.Size(shape).numel(), dtype)  # as cli.explain does
        for shape, dtype in MESSAGES
    ]
    for theirs, decisions in cpu_pool(world_size).run(_explained, strategy, settings):
        assert theirs == facts
        assert decisions == expected


def test_ranks_of_check_prove_shared_memory() -> None:
    assert run(Task("cpu", 2, TransportChoice.AUTO)).outcome == "proved"


def test_a_setting_that_ranks_refuse_is_the_answer() -> None:
    found = run(Task("cpu", 2, TransportChoice.AUTO, workspace_bytes=1))
    assert found.outcome == "failed"
    assert "workspace_bytes" in found.text
