"""`explain` and `topo` of several hosts, and the model of what a network costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_allreduce_plugin.algorithms import host_costs, network
from llm_allreduce_plugin.algorithms.base import Message
from llm_allreduce_plugin.algorithms.host_costs import Network, cost, inside_bytes_per_s
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.cli.hosts import Hosts, parse_hosts, parse_link
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.topology.links import TopologyClass
from llm_allreduce_plugin.wire import FORMATS_BETWEEN_HOSTS

FOLDER = Path(__file__).parents[2] / "configs" / "topologies"
RUNNER = CliRunner()
MIB = 1 << 20


def run(*words: str, topology: str | None = None, code: int = 0) -> str:
    command = list(words) if topology is None else [*words, "--topology", str(FOLDER / f"{topology}.json")]
    result = RUNNER.invoke(app, command)
    assert result.exit_code == code, result.output
    return result.output


def explained(*words: str, topology: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("explain", "--json", *words, topology=topology))
    return found


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "low", "high"),
    [(64 << 10, 20, 25), (MIB, 30, 35), (64 * MIB, 440, 480)],
)
def test_the_model_agrees_with_what_was_estimated_by_hand_for_two_hosts_of_eight_h100(
    payload: int, low: float, high: float
) -> None:
    inside = inside_bytes_per_s(TopologyClass.NVSWITCH, 90)
    assert low <= cost(2, 8, payload, Network(46e9), inside).best * 1e6 <= high


def test_and_for_two_hosts_of_eight_l40s_with_one_ethernet_each() -> None:
    """What the network carries: 10.7 ms in fp32, 2.8 in FP8, 0.84 in TQ3, beside 5.9 ms inside."""
    ethernet = Network(100e9 / 8, of_host=True)
    endless = 1e18
    found = cost(2, 8, 64 * MIB, ethernet, endless)
    fixed = 2 * host_costs.STEP_S + host_costs.NETWORK_STEP_S + host_costs.ADD_S
    assert (found.two_steps - fixed) * 1e3 == pytest.approx(10.7, rel=0.01)
    assert (found.compressed[WireFormat.FP8] - fixed) * 1e3 == pytest.approx(2.8, rel=0.02)
    assert (found.compressed[WireFormat.TQ3] - fixed) * 1e3 == pytest.approx(0.84, rel=0.02)
    inside = cost(2, 8, 64 * MIB, Network(endless), inside_bytes_per_s(TopologyClass.PCIE_PEER, 89))
    assert (inside.two_steps - fixed) * 1e3 == pytest.approx(5.9, rel=0.01)


@given(
    st.integers(2, 9),
    st.integers(1, 8),
    st.integers(1, 1 << 32),
    st.floats(1e8, 1e12),
    st.floats(1e9, 1e12),
    st.booleans(),
)
def test_the_model_has_the_order_of_things(
    hosts: int, ranks: int, payload: int, rate: float, inside: float, of_host: bool
) -> None:
    found = cost(hosts, ranks, payload, Network(rate, of_host), inside)
    assert 0 < found.best <= found.two_steps
    assert found.in_pieces <= found.two_steps
    assert found.pieces == network.pieces(Message(payload // 2, "bfloat16", 2)), "as they are run"
    assert all(seconds <= found.in_pieces for seconds in found.compressed.values()), "less is sent"
    assert cost(hosts + 1, ranks, payload, Network(rate, of_host), inside).best >= found.best
    assert cost(hosts, ranks, payload, Network(2 * rate, of_host), inside).best <= found.best
    if ranks > 1 and of_host:
        assert found.two_steps >= cost(hosts, ranks, payload, Network(rate), inside).two_steps


@pytest.mark.parametrize("element", (2, 4))
@pytest.mark.parametrize(("hosts", "ranks"), ((2, 2), (2, 8), (4, 8), (9, 3)))
def test_two_steps_pay_from_where_both_take_as_long(hosts: int, ranks: int, element: int) -> None:
    link, inside = Network(46e9), 360e9
    least = host_costs.two_steps_pay_from(hosts, ranks, link, inside, element)
    at = cost(hosts, ranks, least, link, inside, element)
    assert at.one_step == pytest.approx(at.two_steps, rel=1e-3)
    below, above = (cost(hosts, ranks, size, link, inside, element) for size in (least // 2, 2 * least))
    assert below.one_step < below.two_steps and above.one_step > above.two_steps
    if ranks > 2:  # traffic inside counts: one step has more of it
        assert host_costs.two_steps_pay_from(hosts, ranks, link, inside / 10, element) < least


@pytest.mark.parametrize("wire", FORMATS_BETWEEN_HOSTS)
@pytest.mark.parametrize(("hosts", "ranks"), ((2, 1), (2, 8), (4, 8)))
def test_compression_pays_from_where_both_take_as_long(hosts: int, ranks: int, wire: WireFormat) -> None:
    def ahead(payload: int, link: Network) -> float:
        found = cost(hosts, ranks, payload, link, 360e9)
        return found.best - found.compressed[wire] - host_costs.codec_seconds(hosts, ranks, payload / 2, wire)

    fast, slow = (Network(rate) for rate in (46e9, 12.5e9))
    least = host_costs.compression_pays_from(hosts, ranks, fast, 360e9, wire)
    assert least is not None
    assert ahead(int(least * 0.97), fast) < 0 < ahead(int(least * 1.01) + 1, fast)
    earlier = host_costs.compression_pays_from(hosts, ranks, slow, 360e9, wire)
    assert earlier is not None and earlier < least
    assert host_costs.compression_pays_from(hosts, ranks, Network(1e13), 360e9, wire) is None


# -- options -----------------------------------------------------------------------------------------------------------


def test_hosts_and_links_are_read() -> None:
    assert parse_hosts(None) is None
    assert parse_hosts("2x8") == parse_hosts(" 2X8 ") == Hosts(2, 8)
    assert parse_link(None) is None
    assert parse_link("50GB/s") == Network(50e9)
    assert parse_link("400Gb/s") == parse_link("400Gbit/s") == Network(50e9)
    assert parse_link("12.5 GB/s/host") == parse_link("100Gb/s/host") == Network(12.5e9, of_host=True)
    assert Network(12.5e9, of_host=True).per_gpu(8) == 12.5e9 / 8


@pytest.mark.parametrize("text", ("", "8", "1x8", "2x0", "2x", "x8", "2x8x2", "2000x8", "-2x8", "2.5x8"))
def test_other_hosts_are_refused(text: str) -> None:
    output = run("explain", "--cpu", "--hosts", text, code=2)
    assert "--hosts" in output
    assert "like 2x8" in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    "text", ("", "50", "50GB", "GB/s", "50G/s", "0GB/s", "-1GB/s", "nanGB/s", "9999999TB/s", "50gb/s")
)
def test_other_links_are_refused(text: str) -> None:
    output = run("explain", "--cpu", "--hosts", "2x2", "--link", text, code=2)
    assert "like 50GB/s or 400Gb/s" in " ".join(output.replace("│", " ").split())


# -- explain -----------------------------------------------------------------------------------------------------------


def test_two_nodes_of_eight() -> None:
    output = run("explain", "--hosts", "2x8", "--link", "46GB/s", topology="h100_x8_nvswitch")
    assert output.startswith("# 16 x NVIDIA H100 80GB HBM3 on 2 hosts (h100_x8_nvswitch.json)")
    assert "# MODELLED, not measured" in output
    assert "not MNNVL: --hosts joins them by a network" in output
    rows = {line.split("  ")[0].strip(): line for line in output.splitlines()}
    assert "22.1*" in output
    assert "64 MiB" in rows


def test_the_model_as_json() -> None:
    found = explained("--hosts", "2x8", "--link", "100Gb/s/host", topology="l40s_x8_two_numa")
    model = found["modelled"]
    assert model["measured"] is False
    assert (model["hosts"], model["ranks_per_host"]) == (2, 8)
    assert model["link_bytes_per_s_of_gpu"] == 100e9 / 8 / 8
    largest = next(row for row in model["costs"] if row["bytes"] == 64 * MIB)
    assert largest["in_pieces_us"] == pytest.approx(12200, rel=0.01)
    assert set(largest["compressed_us"]) == set(FORMATS_BETWEEN_HOSTS)
    assert found["group"]["world_size"] == 16
    assert "modelled" not in explained("--hosts", "2x8", topology="l40s_x8_two_numa")
    pays = model["compression_pays_from_bytes"]
    assert set(pays) == set(FORMATS_BETWEEN_HOSTS)
    faster = explained("--hosts", "2x8", "--link", "46GB/s", topology="h100_x8_nvswitch")["modelled"]
    assert all(0 < pays[wire] < faster["compression_pays_from_bytes"][wire] for wire in pays), "slow links pay sooner"
    endless = run("explain", "--hosts", "2x8", "--link", "50TB/s", topology="h100_x8_nvswitch")
    assert "fp8 never pays, tq3 never pays, hadamard2 never pays" in endless


def test_hosts_must_fit() -> None:
    assert "h100_x8_nvswitch.json has 8 GPUs" in run("explain", "--hosts", "2x9", topology="h100_x8_nvswitch", code=2)
    words = ("explain", "--hosts", "2x8", "--tp", "8")
    assert "--tp 8: --hosts 2x8 are 16 ranks" in run(*words, topology="h100_x8_nvswitch", code=2)
    assert explained("--hosts", "2x8", "--tp", "16", topology="h100_x8_nvswitch")["group"]["world_size"] == 16
    output = run("explain", "--link", "50GB/s", topology="h100_x8_nvswitch", code=2)
    assert "--link is for ranks on several hosts" in output
    assert "give --hosts, too" in output
    assert "--link is for GPUs" in run("explain", "--cpu", "--hosts", "2x2", "--link", "50GB/s", code=2)
    assert "--link is for ranks on several hosts" in run(
        "explain", "--link", "50GB/s", topology="domains/one_domain", code=2
    )


def test_cpu_ranks_on_hosts() -> None:
    found = explained("--cpu", "--hosts", "3x2")
    assert found["group"]["where"] == "6 CPU ranks on 3 hosts"
    assert found["group"]["world_size"] == 6


def test_a_recorded_group_on_two_racks_has_a_model_too() -> None:
    model = explained("--link", "50GB/s", topology="domains/two_racks")["modelled"]
    assert (model["hosts"], model["ranks_per_host"]) == (2, 2)
    assert model["inside_bytes_per_s"] == 720e9, "GB200's NVLinks, twice H200's"


def test_explain_says_what_is_known_of_a_domain() -> None:
    notes = explained(topology="domains/placeholder_clique")["group"]["notes"]
    assert any("as NVML says; proved at the start" in note for note in notes)
    assert any("clique 32766 is a placeholder" in note for note in notes)
    notes = explained(topology="domains/no_imex_channel")["group"]["notes"]
    assert any(note.startswith("NVLink does not join the hosts: ranks 2-3: no IMEX channel") for note in notes)


# -- topo --------------------------------------------------------------------------------------------------------------


def test_topo_groups_by_host() -> None:
    lines = run("topo", topology="gb200_x72_nvl72").splitlines()
    assert lines[0] == "Hosts 0-17, each:"
    assert lines[1].split() == ["GPU0", "GPU1", "GPU2", "GPU3", "NUMA"], "one host, not 72 columns"
    assert "Between hosts: NV18" in lines
    assert any(line.split()[:2] == ["MNNVL", "yes"] for line in lines)
    assert len(lines) < 50


def test_topo_tells_hosts_apart_and_says_why_there_is_no_domain() -> None:
    output = run("topo", topology="domains/two_racks")
    assert "Host 0:" in output
    assert "Host 1:" in output
    assert "Between hosts: NET" in output
    assert "No NVLink domain over these hosts: the ranks are in 2 NVLink domains" in output
    assert "fabric completed with 'Insufficient Resources'" in run("topo", topology="domains/status")
