"""NCCL's variables against peer access: host memory, and peers' memory not touched, in engine, explain and check."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llm_allreduce_plugin import AllReduceConfig, NodeTopology
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.config import TransportChoice
from llm_allreduce_plugin.diagnosis import proof
from llm_allreduce_plugin.diagnosis.proof import Proof, Task
from llm_allreduce_plugin.group import cards
from llm_allreduce_plugin.group.capabilities import group_facts
from llm_allreduce_plugin.group.layouts import peer_refusal, refusal_note, transports
from llm_allreduce_plugin.topology.links import Transport

FOLDER = Path(__file__).parents[2] / "configs" / "topologies"
REFUSALS = ({"NCCL_P2P_DISABLE": "1"}, {"NCCL_P2P_LEVEL": "LOC"}, {"NCCL_P2P_LEVEL": "0"})
PERMISSIONS: tuple[dict[str, str], ...] = (
    {},
    {"NCCL_P2P_DISABLE": "0"},
    {"NCCL_P2P_DISABLE": ""},
    {"NCCL_P2P_LEVEL": "NVL"},
    {"NCCL_P2P_LEVEL": "SYS"},
    {"NCCL_P2P_LEVEL": "1"},
)


def config(transport: str = "auto", **others: Any) -> AllReduceConfig:
    return AllReduceConfig(transport=transport, **others)  # type: ignore[arg-type]


def h200() -> NodeTopology:
    return NodeTopology.from_json(FOLDER / "h200_x4_nvswitch.json")


def test_what_refuses() -> None:
    assert [peer_refusal(environment) for environment in REFUSALS] == [
        "NCCL_P2P_DISABLE=1",
        "NCCL_P2P_LEVEL=LOC",
        "NCCL_P2P_LEVEL=0",
    ]
    assert [peer_refusal(environment) for environment in PERMISSIONS] == [None] * len(PERMISSIONS)


def test_auto_heeds_it_and_peer_comes_over_it() -> None:
    refusal = "NCCL_P2P_DISABLE=1"
    assert transports(config(), "cuda") == (Transport.SYMMETRIC, Transport.HOST)
    assert transports(config(), "cuda", refusal) == (Transport.HOST,)
    assert transports(config("host"), "cuda", refusal) == (Transport.HOST,)
    assert transports(config("peer"), "cuda", refusal) == (Transport.SYMMETRIC,)
    assert transports(config(), "cpu", refusal) == (Transport.SHM,)
    assert refusal_note(TransportChoice.HOST, refusal) is None
    assert refusal_note(TransportChoice.AUTO, None) is None
    for choice in (TransportChoice.AUTO, TransportChoice.PEER):
        note = refusal_note(choice, refusal)
        assert note is not None
        assert refusal in note


def test_facts_are_those_of_host_memory() -> None:
    for environment in REFUSALS:
        refused = group_facts(h200(), 4, config(), peer_refusal(environment))
        assert refused == group_facts(h200(), 4, config("host"))
    for environment in PERMISSIONS:
        assert group_facts(h200(), 4, config(), peer_refusal(environment)).transport is Transport.SYMMETRIC
    assert group_facts(h200(), 4, config("peer"), "NCCL_P2P_DISABLE=1") == group_facts(h200(), 4, config("peer"))


@pytest.mark.parametrize("with_it", ((0, 1, 2), (2,), (0,), ()))
def test_one_rank_with_it_is_enough_for_all(with_it: tuple[int, ...]) -> None:
    mine = cards.RankCard.of_this_rank(AllReduceConfig(), torch.device("cpu"))
    group = [
        dataclasses.replace(mine, peer_refusal="NCCL_P2P_DISABLE=1" if rank in with_it else None) for rank in range(3)
    ]
    cards.check(group)  # it is no setting: ranks go on
    refusal = cards.peer_refusal_of(group)
    assert (refusal is None) is (not with_it)
    if refusal is not None:
        assert transports(config(), "cuda", refusal) == (Transport.HOST,)
        assert refusal == ("NCCL_P2P_DISABLE=1" if len(with_it) == 3 else f"NCCL_P2P_DISABLE=1 on rank {with_it[0]}")


def test_cpu_ranks_have_no_peers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert cards.RankCard.of_this_rank(AllReduceConfig(), torch.device("cpu")).peer_refusal is None


def explained(*arguments: str) -> Any:
    topology = str(FOLDER / "h200_x4_nvswitch.json")
    result = CliRunner().invoke(app, ["explain", "--topology", topology, "--json", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)["group"]


def test_explain_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explained()["transport"] == "symmetric"
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    refused = explained()
    assert refused["transport"] == "host"
    assert refusal_note(TransportChoice.AUTO, "NCCL_P2P_DISABLE=1") in refused["notes"]
    by_name = explained("--transport", "peer")
    assert by_name["transport"] == "symmetric"
    assert refusal_note(TransportChoice.PEER, "NCCL_P2P_DISABLE=1") in by_name["notes"]


@pytest.mark.parametrize(("transport", "tried"), [("auto", ["host"]), ("host", ["host"]), ("peer", ["peer", "host"])])
def test_check_does_not_touch_peers(transport: str, tried: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[Task] = []

    def runner(task: Task) -> Proof:
        tasks.append(task)
        return Proof("proved", "ranks summed to the bit")

    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    proof.findings(h200(), config(transport), runner)
    assert [str(task.transport) for task in tasks] == tried
