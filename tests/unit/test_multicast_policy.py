"""Which calls go by multicast, and what is said of it: on recorded nodes, where nothing is opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_allreduce_plugin import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.algorithms.base import Numerics
from llm_allreduce_plugin.algorithms.decision import Exchange
from llm_allreduce_plugin.algorithms.facts import GroupFacts, MulticastBytes
from llm_allreduce_plugin.algorithms.multicasting import UNTRIED
from llm_allreduce_plugin.cli import app, tune
from llm_allreduce_plugin.diagnosis import hardware
from llm_allreduce_plugin.errors import ConfigError
from llm_allreduce_plugin.group import multicast
from llm_allreduce_plugin.group.capabilities import cpu_facts, group_facts
from llm_allreduce_plugin.selection.policy import decide, decide_fused
from llm_allreduce_plugin.settings.faults import validated
from llm_allreduce_plugin.topology.model import NodeTopology
from tests.conftest import MULTICAST_SWITCHES
from tests.support.profiles import cpu_entry, entry

NODES = Path(__file__).parents[2] / "configs" / "topologies"
SIZES = (1, 8, 4096, 1 << 20, 12_345_678, 1 << 28)


@pytest.fixture
def _no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a node whose user has switched nothing off. Only facts of recorded nodes are made: no driver is asked."""
    for name in MULTICAST_SWITCHES:
        monkeypatch.delenv(name)


def facts_of(config: AllReduceConfig, node: str = "h100_x8_nvswitch", ranks: int | None = None) -> GroupFacts:
    return group_facts(NodeTopology.from_json(NODES / f"{node}.json"), ranks, config)


def config_of(strategy: str = "TWOSHOT", **settings: Any) -> AllReduceConfig:
    return AllReduceConfig(allreduce_strategy=strategy, **{"multicast": "on"} | settings)


def exchange_of(config: AllReduceConfig, facts: GroupFacts, count: int) -> Exchange | None:
    launch = decide(config, facts, count, "bfloat16").launch
    return None if launch is None else launch.exchange


@pytest.mark.usefixtures("_no_switch")
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("ranks", (2, 4, 8))
def test_one_shot_and_two_shot_go_by_multicast_when_asked(ranks: int, count: int) -> None:
    for strategy in ("ONESHOT", "TWOSHOT"):
        config = config_of(strategy)
        facts = facts_of(config, ranks=ranks)
        decision = decide(config, facts, count, "bfloat16")
        launch = decision.launch
        assert launch is not None
        assert launch.exchange is Exchange.MULTICAST
        assert UNTRIED in decision.reason
        assert decision.numerics == Numerics.EXACT
        assert decision.counted_as == f"{strategy} (multicast)"
        parts = 1 if strategy == "ONESHOT" else ranks
        room = facts.multicast.one_shot if parts == 1 else facts.multicast.results // parts
        assert launch.chunk_vectors * 16 <= room
        assert launch.chunk_vectors * parts * launch.rounds * 8 >= count


@pytest.mark.usefixtures("_no_switch")
@given(
    st.sampled_from([name for name in AllReduceStrategy if name not in ("ONESHOT", "TWOSHOT")]),
    st.sampled_from(("off", "on", "auto")),
    st.booleans(),
    st.integers(1, 1 << 28),
    st.sampled_from((2, 3, 4, 8)),
)
def test_no_other_strategy_goes_by_multicast(
    strategy: AllReduceStrategy, choice: str, in_switch: bool, count: int, ranks: int
) -> None:
    """AUTO and MINLATENCY choose by what was measured, and nothing was."""
    config = AllReduceConfig(allreduce_strategy=strategy, multicast=choice, in_switch_sum=in_switch)
    assert exchange_of(config, facts_of(config, ranks=ranks), count) not in (Exchange.MULTICAST, Exchange.IN_SWITCH)


@pytest.mark.usefixtures("_no_switch")
@pytest.mark.parametrize("in_switch", (False, True))
@pytest.mark.parametrize("choice", ("on", "auto"))
@pytest.mark.parametrize("strategy", [name for name in AllReduceStrategy if name not in ("ONESHOT", "TWOSHOT")])
def test_nothing_is_opened_for_other_strategies(strategy: AllReduceStrategy, choice: str, in_switch: bool) -> None:
    """Whatever it costs would be for nothing, and it may fail the start. NCCL, the engine's own path, opens nothing."""
    facts = facts_of(config_of(strategy, multicast=choice, in_switch_sum=in_switch))
    assert facts.multicast == MulticastBytes()
    if strategy is not AllReduceStrategy.NCCL:
        assert facts.no_multicast_reason == f"{strategy} does not go by multicast: ask for ONESHOT or TWOSHOT"


@pytest.mark.usefixtures("_no_switch")
@pytest.mark.parametrize("strategy", ("ONESHOT", "TWOSHOT"))
def test_inputs_that_the_switch_sums_have_room_only_under_two_shot(strategy: str) -> None:
    config, without = config_of(strategy, in_switch_sum=True), config_of(strategy)
    facts = facts_of(config)
    assert bool(facts.multicast.inputs) == (strategy == "TWOSHOT")
    layout = multicast.layout_of(config, 8)
    assert layout.total_bytes == multicast.MULTICAST_BYTES * (2 if strategy == "TWOSHOT" else 1)
    reason = decide(config, facts, 4096, "bfloat16").reason
    assert ("in_switch_sum is of TWOSHOT alone" in reason) == (strategy == "ONESHOT")
    assert "in_switch_sum" not in decide(without, facts_of(without), 4096, "bfloat16").reason


@pytest.mark.usefixtures("_no_switch")
def test_the_switch_sums_only_when_asked_by_its_own_name() -> None:
    config = config_of(in_switch_sum=True)
    facts = facts_of(config)
    decision = decide(config, facts, 1 << 24, "bfloat16")
    assert decision.launch is not None
    assert decision.launch.exchange is Exchange.IN_SWITCH
    assert decision.numerics == Numerics.IN_SWITCH
    assert "in_switch_sum" in decision.reason
    assert UNTRIED in decision.reason
    assert f"bits: {Numerics.IN_SWITCH}" in str(decision)
    assert exchange_of(config_of(), facts_of(config_of()), 1 << 24) is Exchange.MULTICAST
    one_shot = config_of("ONESHOT", in_switch_sum=True)
    assert exchange_of(one_shot, facts_of(one_shot), 4096) is Exchange.MULTICAST
    off = config_of(multicast="off", in_switch_sum=True)
    assert exchange_of(off, facts_of(off), 1 << 24) is Exchange.PUSH


@pytest.mark.usefixtures("_no_switch")
def test_fused_kernels_push_and_give_the_same_bits() -> None:
    config = config_of()
    fused = decide_fused(config, facts_of(config), 64, 4096, "bfloat16", however_slow=True)
    assert fused.launch is not None
    assert fused.launch.exchange is Exchange.PUSH
    in_switch = config_of(in_switch_sum=True)
    apart = decide_fused(in_switch, facts_of(in_switch), 64, 4096, "bfloat16")
    assert apart.launch is None
    assert "summed in the switch" in apart.reason


def test_a_switch_of_the_environment_wins() -> None:
    """Both are set in every test."""
    config = config_of()
    facts = facts_of(config)
    assert facts.multicast.results == 0
    assert facts.no_multicast_reason == "multicast is switched off by TORCH_SYMM_MEM_DISABLE_MULTICAST=1"
    decision = decide(config, facts, 1 << 20, "bfloat16")
    assert decision.launch is not None
    assert decision.launch.exchange is Exchange.PUSH
    assert f"not by multicast: {facts.no_multicast_reason}" in decision.reason


@pytest.mark.parametrize("switch", MULTICAST_SWITCHES.items())
def test_one_switch_is_enough(switch: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MULTICAST_SWITCHES:
        monkeypatch.delenv(name)
    monkeypatch.setenv(*switch)
    assert facts_of(config_of()).no_multicast_reason == f"multicast is switched off by {'='.join(switch)}"


@pytest.mark.usefixtures("_no_switch")
def test_where_there_is_none() -> None:
    reasons = {
        "off": facts_of(AllReduceConfig()),
        "switches of sm_89": facts_of(config_of(), "l40s_x8_two_numa"),
        "GPU memory that ranks share": facts_of(config_of(transport="host")),
        "in_band is off": facts_of(config_of(in_band=False)),
        "hosts": facts_of(config_of(), "gb200_x72_nvl72"),
        "two ranks": facts_of(config_of(multicast="auto"), ranks=2),
    }
    for part, facts in reasons.items():
        assert facts.multicast.results == 0, part
        assert part in facts.no_multicast_reason, facts.no_multicast_reason
    assert cpu_facts(4, config_of()).multicast.results == 0


def test_settings_are_read_in_any_spelling() -> None:
    for value in ("ON", "on", True):
        assert validated("test", AllReduceConfig, {"multicast": value}).multicast == "on"
    assert validated("test", AllReduceConfig, {"multicast": "Auto", "in_switch_sum": "on"}).in_switch_sum
    assert AllReduceConfig().multicast == "off"
    assert not AllReduceConfig().in_switch_sum
    with pytest.raises(ConfigError, match="multicast='maybe'"):
        validated("test", AllReduceConfig, {"multicast": "maybe"})


def test_memory_is_as_the_layout_says() -> None:
    for in_switch in (False, True):
        layout = multicast.layout_of(config_of(in_switch_sum=in_switch), 8)
        assert layout.total_bytes == multicast.MULTICAST_BYTES * (2 if in_switch else 1)
        assert bool(layout.inputs_bytes) == in_switch


def test_what_it_would_bring_is_told() -> None:
    told = multicast.outlook([True] * 8, None, 8)
    assert "off unless asked for" in told
    assert "store once instead of 7 times" in told
    assert "1.12 bytes for each byte of a large message, not 1.75" in told
    assert told.endswith("Neither has run on hardware yet")
    three = multicast.outlook([True] * 3, None, 3)
    assert "with in_switch_sum a GPU would send as much over three GPUs, 1.33 bytes for each byte" in three
    assert "not 1.33" not in three
    assert "switched off by NCCL_NVLS_ENABLE=0" in multicast.outlook([True] * 4, "NCCL_NVLS_ENABLE=0", 4)
    assert multicast.outlook([True, False, True, False], None, 4) == "GPU 1, 3 has none"
    assert multicast.outlook([True, None], None, 2) == "not known of all GPUs"
    assert "nothing to win" in multicast.outlook([True, True], None, 2)


def _said(command: str, *arguments: str) -> list[str]:
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 0, result.output
    return [line for line in result.output.splitlines() if "ulticast: " in line]


@pytest.mark.usefixtures("_no_switch")
def test_all_commands_say_the_same_of_it() -> None:
    """Where an NVSwitch is between the GPUs of a group; elsewhere those that speak of a group are silent."""
    switched, wired = (NODES / f"{name}.json" for name in ("h100_x8_nvswitch", "l40s_x8_two_numa"))
    topology = NodeTopology.from_json(switched)
    told = multicast.node_outlook(topology, 8)
    assert "off unless asked for" in told
    assert told.endswith("Neither has run on hardware yet")
    assert _said("topo", "--topology", str(switched)) == [f"Multicast: {told}"]
    for arguments in ([], ["--sweep"], ["--strategy", "TWOSHOT"], ["--fused"]):
        assert _said("explain", "--topology", str(switched), *arguments) == [f"# multicast: {told}"]
    assert f"multicast: {told}; fabric" in hardware.multicast(topology).text
    (line,) = _said("explain", "--topology", str(switched), "--tp", "4")
    assert "store once instead of 3 times" in line
    made = entry(world_size=8, topology_class="nvswitch")
    assert f"# multicast: {told}" in tune._report(made, topology).splitlines()

    for others in (["--topology", str(wired)], ["--topology", str(switched), "--transport", "host"], ["--cpu"]):
        assert _said("explain", *others) == []
    assert _said("explain", "--topology", str(switched), "--hosts", "2x8") == []
    for other in ({"topology_class": "pcie_peer"}, {"transport": "host", "topology_class": "host_memory"}):
        assert "# multicast: " not in tune._report(entry(world_size=8, **other), topology)
    assert "# multicast: " not in tune._report(entry(world_size=8, hosts=2, topology_class="nvswitch"), topology)
    assert "# multicast: " not in tune._report(cpu_entry(2), None)


SWITCHED_OFF = pytest.mark.parametrize("switch", MULTICAST_SWITCHES.items())


@SWITCHED_OFF
@pytest.mark.parametrize(
    "command", (["bash", "scripts/validate_multicast.sh"], [sys.executable, "benchmarks/multicast.py"])
)
def test_validation_refuses_while_a_switch_is_set(command: list[str], switch: tuple[str, str]) -> None:
    """Whatever is installed: it comes before anything else."""
    environment = {name: value for name, value in os.environ.items() if name not in MULTICAST_SWITCHES}
    result = subprocess.run(
        command, env=environment | dict([switch]), cwd=NODES.parents[1], capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    assert "refused" in result.stderr.lower()
    assert "=".join(switch) in result.stderr
    assert "sked of the driver" in result.stderr
    assert result.stdout == ""
