"""`check --torchrun`: what ranks on several hosts find, and what they say where nothing answers."""

from __future__ import annotations

import dataclasses
import time

import pytest
from typer.testing import CliRunner

from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.diagnosis import Verdict, across, hardware
from llm_allreduce_plugin.diagnosis.across import of_hosts, of_sums
from llm_allreduce_plugin.measure.torchrun import Place
from llm_allreduce_plugin.topology.links import Transport
from tests.unit.test_fabric import VERDICTS, domain
from tests.unit.test_topology import load

STARTED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
TWO = GroupFacts(4, "cuda", Transport.SYMMETRIC, hosts=(0, 0, 1, 1), fabric=True)


def test_a_place_is_what_torchrun_says() -> None:
    assert Place.of(STARTED) == Place(3, 4, 1)
    with pytest.raises(ValueError, match="RANK, LOCAL_RANK not set: start it on every host with torchrun"):
        Place.of({name: value for name, value in STARTED.items() if "RANK" not in name})


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("RANK", "x", "RANK='x': must be a whole number"),
        ("WORLD_SIZE", "-4", "WORLD_SIZE='-4': must be a whole number"),
        ("LOCAL_RANK", "1.0", "LOCAL_RANK='1.0': must be a whole number"),
        ("RANK", "9" * 300, "RANK='9999.*': must be a whole number"),
        ("RANK", "4", "RANK=4: must be less than WORLD_SIZE=4"),
        ("LOCAL_RANK", "4", "LOCAL_RANK=4: must be less than WORLD_SIZE=4"),
    ],
)
def test_what_torchrun_would_not_say_is_named(name: str, text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        Place.of(STARTED | {name: text})
    assert len(str(caught.value)) < 300


def test_without_torchrun_the_command_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(app, ["check", "--torchrun"])
    assert result.exit_code == 2
    assert "start it on every host with torchrun" in " ".join(result.output.replace("│", " ").split())


def test_hosts_and_what_joins_them() -> None:
    assert [(found.verdict, found.text) for found in of_hosts(TWO)] == [
        (Verdict.OK, "4 ranks on 2 hosts (2, 2)"),
        (Verdict.OK, "proved: memory of all 4 ranks was written and read by all"),
    ]
    refused = dataclasses.replace(TWO, fabric=False, no_fabric_reason="rank 2: no")
    assert [(found.verdict, found.text) for found in of_hosts(refused)[1:]] == [(Verdict.WARN, "rank 2: no")]
    uneven = dataclasses.replace(refused, world_size=3, hosts=(0, 1, 1))
    assert (of_hosts(uneven)[0].verdict, of_hosts(uneven)[0].text) == (Verdict.WARN, "3 ranks on 2 hosts (1, 2)")
    one = dataclasses.replace(TWO, hosts=(0,) * 4, fabric=False)
    assert [found.text for found in of_hosts(one)] == ["4 ranks on 1 host (4)"]


def test_sums() -> None:
    assert of_sums(TWO, 0, "because").verdict is Verdict.OK
    assert of_sums(TWO, 7, "because").verdict is Verdict.FAIL
    engine = dataclasses.replace(TWO, transport=Transport.NONE, no_transport_reason="2 hosts")
    found = of_sums(engine, 0, "because")
    assert found.verdict is Verdict.WARN
    assert "2 hosts" in found.text


def test_the_order_of_sums_over_hosts() -> None:
    """Flat within one domain; otherwise each host first."""
    assert TWO.host_order == (0, 0, 0, 0)
    assert dataclasses.replace(TWO, fabric=False).host_order == (0, 0, 1, 1)
    assert dataclasses.replace(TWO, fabric=False, hosts=()).host_order == (0, 0, 0, 0)


def test_what_hangs_is_said_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(_place: Place, steps: list[str]) -> list[across.Finding]:
        steps.append("summing")
        time.sleep(60)
        return []

    monkeypatch.setattr(across, "_look", hang)
    began = time.monotonic()
    (found,), hangs = across.findings(Place(1, 2, 0), timeout_s=0.2)
    assert time.monotonic() - began < 5
    assert hangs
    assert found.verdict is Verdict.FAIL
    assert "rank 1 had no answer within 0.2 s; the last step was: summing" in found.text


def test_what_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_place: Place, steps: list[str]) -> list[across.Finding]:
        steps.append("meeting the other ranks")
        message = "no route\nto host"
        raise RuntimeError(message)

    monkeypatch.setattr(across, "_look", fail)
    (found,), hangs = across.findings(Place(0, 2, 0))
    assert not hangs
    assert found.text == "rank 0, meeting the other ranks: RuntimeError: no route to host"


@pytest.mark.parametrize("name", VERDICTS)
def test_check_says_of_one_host_whether_a_domain_could_be_used(name: str) -> None:
    node = domain(name).subset([2, 3])
    found = hardware.domain(node)
    if name in {"zero_uuid", "unknown", "in_progress"}:
        assert found is None, "no domain is named"
        return
    assert found is not None
    assert found.verdict is Verdict.OK, "one host needs no domain"
    reason = {"status": "fabric status", "no_imex_channel": "no IMEX channel", "no_handles": "no fabric handles"}
    assert (reason.get(name, "as NVML says") in found.text) or name == "one_gpu_elsewhere"
    assert name != "one_gpu_elsewhere" or "2 NVLink domains" in found.text


def test_check_says_nothing_of_domains_where_there_are_none() -> None:
    assert hardware.domain(load("l40s_x8_two_numa")) is None
