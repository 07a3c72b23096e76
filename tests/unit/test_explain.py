"""llm-allreduce explain: the engine's decision without an engine, for every recorded node."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_allreduce_plugin import AllReduceConfig, AllReduceStrategy, NodeTopology
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.ranges import bytes_in_words
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.group.capabilities import cpu_facts, group_facts
from llm_allreduce_plugin.group.layouts import DEFAULT_GPU_WORKSPACE_BYTES, FLAGGED_GPU_WORKSPACE_BYTES
from llm_allreduce_plugin.profiles.file import store
from llm_allreduce_plugin.quantization import QuantKind
from llm_allreduce_plugin.selection.policy import decide, decide_fused
from llm_allreduce_plugin.selection.sweep import LARGEST_BYTES, SMALLEST_BYTES, name_of, size_text, sweep
from llm_allreduce_plugin.topology import NodeIdentity
from llm_allreduce_plugin.topology.links import Transport
from tests.support.profiles import cpu_entry, registered

FOLDER = Path(__file__).parents[2] / "configs" / "topologies"
FILES = sorted(FOLDER.glob("*.json"))
RUNNER = CliRunner()
S = AllReduceStrategy


def load(name: str) -> NodeTopology:
    return NodeTopology.from_json(FOLDER / f"{name}.json")


def facts(name: str, world_size: int | None = None, **options: Any) -> GroupFacts:
    return group_facts(load(name), world_size, AllReduceConfig(**options))


def run(*arguments: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, ["explain", *arguments])
    return result.exit_code, result.output


def explained(*arguments: str) -> Any:
    code, output = run(*arguments, "--json")
    assert code == 0, output
    return json.loads(output)


# -- facts -------------------------------------------------------------------------------------------------------------


def test_facts_have_the_layout_of_a_communicator() -> None:
    """Two blocks to a multiprocessor of the GPU at hand, and slots that fill the default workspace."""
    for name, lanes in (("h200_x4_nvswitch", 264), ("l40s_x8_two_numa", 284), ("gb200_x72_nvl72", 264)):
        group = facts(name, 4)
        assert group.lanes == lanes
        has_stages = name == "l40s_x8_two_numa"
        default = FLAGGED_GPU_WORKSPACE_BYTES if has_stages else DEFAULT_GPU_WORKSPACE_BYTES
        assert group.in_band.two_shot * 2 * 4 <= default
        assert group.in_band.two_shot > default // 256
        assert (group.flagged.two_shot > 0) is has_stages
    host = facts("rtx4090_x8_no_p2p")
    assert (host.transport, host.lanes) == (Transport.HOST, 64)
    assert host.in_band.one_shot > 0
    assert host.flagged.two_shot > 0


def test_settings_reach_the_facts() -> None:
    assert facts("h200_x4_nvswitch", transport="host").transport is Transport.HOST
    peer = facts("rtx4090_x8_no_p2p", transport="peer")
    assert peer.transport is Transport.NONE
    assert peer.no_transport_reason == "the GPUs of ranks 0 and 1 have no peer access (CNS: chipset not supported)"
    assert facts("h200_x4_nvswitch", in_band=False).in_band.two_shot == 0
    tq3 = facts("h200_x4_nvswitch", allreduce_strategy="LOWPRECISION", low_precision={"wire_format": "tq3"})
    assert tq3.flagged.two_shot > 0
    assert facts("h200_x4_nvswitch", allreduce_strategy="NCCL").no_transport_reason == "allreduce_strategy is NCCL"
    small = facts("h100_x8_nvswitch", workspace_bytes=2 << 20).in_band.two_shot
    assert 0 < small < facts("h100_x8_nvswitch").in_band.two_shot
    assert cpu_facts(3).transport is Transport.SHM
    assert "no kernel for 73 ranks" in cpu_facts(73).no_transport_reason


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("strategy", list(S))
def test_every_recorded_node_has_sensible_decisions(path: Path, strategy: S) -> None:
    topology = NodeTopology.from_json(path)
    config = AllReduceConfig(allreduce_strategy=strategy)
    for world_size in {0, 1, 2, 3, 4, 8, 72} & set(range(len(topology.gpus) + 1)):
        group = group_facts(topology, world_size, config)
        runs = [found.decision.strategy for found in sweep(config, group, "bfloat16")]
        hosts = len({gpu.host for gpu in topology.gpus[:world_size]})
        assert group.fabric is (hosts > 1), "the only node of several hosts is one NVLink domain"
        if world_size < 2 or strategy is S.NCCL:
            assert runs == [S.NCCL], (world_size, runs)
        else:
            assert S.NCCL not in runs, (world_size, runs)
            if strategy is not S.LOWPRECISION:
                assert S.LOWPRECISION not in runs


def test_a_smaller_step_for_more_ranks_and_slower_links() -> None:
    """One-shot sends N - 1 times the message: it must give way earlier with more ranks, and earlier over PCIe."""

    def changeover(name: str, world_size: int) -> int:
        config = AllReduceConfig()
        first = sweep(config, facts(name, world_size), "bfloat16")[0]
        assert first.decision.strategy is S.ONESHOT
        return first.last_bytes

    assert changeover("h100_x8_nvswitch", 8) < changeover("h100_x8_nvswitch", 4) == changeover("h200_x4_nvswitch", 4)
    assert changeover("l40s_x8_two_numa", 8) < changeover("h100_x8_nvswitch", 8)
    assert changeover("gb200_x72_nvl72", 4) > changeover("h200_x4_nvswitch", 4)


# -- the sweep ---------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from([path.stem for path in FILES if path.stem != "no_gpu"]),
    st.sampled_from(list(S)),
    st.sampled_from(("auto", "host")),
    st.sampled_from(("bfloat16", "float32")),
    st.sampled_from((2, 3, 4)),
    st.integers(0, LARGEST_BYTES),
)
@settings(max_examples=60, deadline=None)
def test_a_sweep_says_what_the_policy_says(
    name: str, strategy: S, transport: str, dtype: str, world_size: int, size: int
) -> None:
    config = AllReduceConfig(allreduce_strategy=strategy, transport=transport)
    group = group_facts(load(name), world_size, config)
    element = 4 if dtype == "float32" else 2
    ranges = sweep(config, group, dtype)
    assert ranges[0].first_bytes == SMALLEST_BYTES
    assert ranges[-1].last_bytes == LARGEST_BYTES
    for found, following in itertools.pairwise(ranges):
        assert following.first_bytes == found.last_bytes + element
    wanted = max(SMALLEST_BYTES, size - size % element)
    found = next(found for found in ranges if found.first_bytes <= wanted <= found.last_bytes)
    assert found.name == name_of(decide(config, group, wanted // element, dtype))


def test_sizes_are_written_exactly() -> None:
    assert [size_text(size) for size in (0, 16, 1024, 196608, 196610, 1 << 20, 1 << 30)] == [
        "0", "16", "1 KiB", "192 KiB", "196610", "1 MiB", "1 GiB",
    ]  # fmt: skip
    assert [bytes_in_words(size) for size in (0, 1536, 1 << 30, 5 << 29, 1 << 40)] == [
        "0 bytes", "1.5 KiB", "1 GiB", "2.5 GiB", "1 TiB",
    ]  # fmt: skip


# -- the command -------------------------------------------------------------------------------------------------------

H200 = str(FOLDER / "h200_x4_nvswitch.json")


def test_the_decision_and_every_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ALLREDUCE_TUNING_PROFILE", "none")  # a profile ships for such a node
    code, output = run("--topology", H200, "--tokens", "8", "--hidden", "8192", "--dtype", "bf16", "--tp", "4")
    assert code == 0
    lines = output.splitlines()
    assert lines[0] == "# 4 x NVIDIA H200 (h200_x4_nvswitch.json), peer memory, allreduce_strategy AUTO"
    assert lines[2].startswith("# multicast: ")
    assert lines[3] == "# 8 x 8192 of bfloat16: 128 KiB per rank"
    decision = decide(AllReduceConfig(), facts("h200_x4_nvswitch", 4), 8 * 8192, "bfloat16")
    assert lines[4:] == str(decision).splitlines()
    for strategy in S:
        if strategy not in (S.AUTO, S.ONESHOT):
            assert any(line.startswith(f"  not {strategy}: ") for line in lines)


def test_json_is_the_decision_and_the_ranges() -> None:
    document = explained("--topology", H200, "--strategy", "uB", "--bytes", "1M", "--sweep")
    assert document["decision"]["strategy"] == "TWOSHOT"
    assert not document["decision"]["is_fallback"], "what is small is left to TWOSHOT"
    assert document["decision"]["launch"]["algorithm"] == "TWO_SHOT"
    assert document["decision"]["launch"]["lanes"] == 64
    assert document["message"] == {"count": 1 << 19, "dtype": "bfloat16", "bytes": 1 << 20}
    assert document["settings"] == {"allreduce_strategy": "UB"}
    assert document["ranges"][0]["first_bytes"] == 16
    assert document["ranges"][-1]["last_bytes"] == 1 << 30


def test_json_tells_a_fallback_from_what_is_meant_to_be() -> None:
    document = explained("--topology", H200, "--strategy", "LOWPRECISION", "--bytes", "64K", "--sweep")
    assert document["decision"]["strategy"] == "MINLATENCY"
    assert (document["decision"]["is_fallback"], document["decision"]["by_design"]) == (False, True)
    assert "the exact kernels are faster" in document["decision"]["reason"]
    assert not any(found["is_fallback"] for found in document["ranges"])


def test_settings_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ALLREDUCE_TRANSPORT", "host")
    monkeypatch.setenv("LLM_ALLREDUCE_LOW_PRECISION", '{"min_bytes": 0}')
    document = explained("--topology", H200, "--strategy", "lowprecision", "--wire-format", "tq3")
    assert document["group"]["transport"] == "host"
    assert document["decision"]["launch"]["wire_format"] == "tq3"
    assert explained("--topology", H200, "--transport", "peer")["group"]["transport"] == "symmetric"
    monkeypatch.setenv("LLM_ALLREDUCE_TRANSPORT", "pigeon")
    code, output = run("--topology", H200)
    assert code == 2
    assert "LLM_ALLREDUCE_TRANSPORT='pigeon'" in " ".join(output.replace("│", " ").split())


def test_registered_outputs_that_a_profile_chooses_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only where the settings ask for registered memory; what else runs stands beside it."""
    said = registered(((8192, "TWOSHOT"), (None, "UB")))
    profile = store(tmp_path / "profile.json", NodeIdentity.of_cpu(), [cpu_entry(2, registered=said)])
    assert profile.entries
    monkeypatch.setenv("LLM_ALLREDUCE_TUNING_PROFILE", str(tmp_path / "profile.json"))
    arguments = ("--cpu", "--tp", "2", "--bytes", "16K")
    before = explained(*arguments)["decision"]
    assert before["launch"]["exchange"] == "FLAGS"
    monkeypatch.setenv("LLM_ALLREDUCE_REGISTERED_POOL", "1M")
    decision = explained(*arguments)["decision"]
    assert (decision["strategy"], decision["launch"]["exchange"]) == ("UB", "PLACE")
    assert decision["reason"].startswith(
        "16 KiB are more than 8 KiB, where results stored into registered outputs were fastest (profile "
    )
    assert explained("--cpu", "--tp", "2", "--bytes", "8K")["decision"]["strategy"] == before["strategy"]


def test_what_is_assumed_is_said() -> None:
    _, output = run("--topology", str(FOLDER / "gb200_x72_nvl72.json"), "--tp", "4")
    assert "# the number of multiprocessors is not known: the launch is computed for 132" in output
    _, output = run("--topology", str(FOLDER / "rtx4090_x8_no_p2p.json"))
    assert "# through host memory: GPU0 and GPU1 have no peer access (CNS: chipset not supported)" in output
    _, output = run("--cpu", "--tp", "3")
    assert output.startswith("# 3 CPU ranks, shm memory, allreduce_strategy AUTO\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--topology", H200, "--tp", "5"], "world size 5: the topology has 4 GPUs"),
        (["--topology", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--topology", H200, "--dtype", "bf15"], "--dtype bf15: must be one of"),
        (["--topology", H200, "--bytes", "0"], "--bytes '0': must be a positive number of bytes up to 1T"),
        (["--topology", H200, "--bytes", "3"], "--bytes '3': must be a multiple of 2, the bytes of a bfloat16"),
        (["--topology", H200, "--cpu"], "--cpu: not with --topology, which is a node with GPUs"),
        (["--topology", H200, "--strategy", "fastest"], "must be one of AUTO, NCCL"),
        (["--topology", H200, "--dtype", "int32", "--sweep"], "dtype int32: no kernel handles it"),
    ],
)
def test_bad_input(arguments: list[str], text: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert text in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--bytes", "2"], "# 1 element of bfloat16: 2 bytes per rank"),
        (["--bytes", "1000"], "# 500 elements of bfloat16: 1000 bytes per rank"),
        (["--bytes", "1T"], "# 549755813888 elements of bfloat16: 1 TiB per rank"),
        (["--rows", "0"], "# 0 x 8192 of bfloat16: 0 bytes per rank"),
    ],
)
def test_sizes_have_a_unit(arguments: list[str], line: str) -> None:
    code, output = run("--topology", H200, *arguments)
    assert (code, line in output.splitlines()) == (0, True), output


def test_a_wire_format_that_nothing_uses_is_told() -> None:
    line = "# --wire-format tq3: AUTO never compresses, LOWPRECISION does"
    for shown in ([], ["--sweep"], ["--fused"]):
        assert line in run("--topology", H200, "--wire-format", "tq3", *shown)[1].splitlines()
    assert line[2:] in explained("--topology", H200, "--wire-format", "tq3")["group"]["notes"]
    assert "--wire-format" not in run("--topology", H200, "--wire-format", "tq3", "--strategy", "lowprecision")[1]


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--strategy", "UB", "--transport", "host"], ["# TWOSHOT, because ranks share host memory, and outputs lie"]),
        (["--strategy", "UB", "--tp", "2"], ["# ONESHOT, because over two GPUs one step stores sums straight"]),
        (["--strategy", "lowprecision", "-d", "fp32"], ["# MINLATENCY, because compression is for bfloat16 and"]),
        (["--strategy", "lowprecision"], ["# MINLATENCY, because below 1.125 MiB the exact kernels are faster"]),
        (["--strategy", "UB"], ["# TWOSHOT, because below 4 MiB", "# TWOSHOT, because messages above 128 MiB"]),
        (["--tp", "1"], ["# NCCL, because no kernel for 1 rank"]),
        (["--strategy", "TWOSHOT"], []),
        (["--strategy", "NCCL"], []),
        ([], []),
    ],
)
def test_a_sweep_says_why_another_strategy_runs(arguments: list[str], lines: list[str]) -> None:
    code, output = run("--topology", H200, "--sweep", *arguments)
    assert code == 0
    _, table = output.split("launch\n")
    found = [line for line in table.splitlines() if line.startswith("#")]
    assert len(found) == len(lines), found
    assert all(line.startswith(said) for line, said in zip(found, lines, strict=True)), found


def test_a_type_without_a_kernel_is_explained() -> None:
    document = explained("--topology", H200, "--dtype", "int32")
    assert document["decision"]["strategy"] == "NCCL"
    assert document["message"]["bytes"] == 8 * 8192 * 4
    assert "no kernel for dtype int32" in document["decision"]["reason"]


def test_norms_behind_an_all_reduce_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same decision as the engine's, with the launch, or the reason for two kernels."""
    monkeypatch.setenv("LLM_ALLREDUCE_TUNING_PROFILE", "none")  # a profile ships for such a node
    code, output = run(
        "--topology", H200, "--tp", "2", "--fused", "--rows", "4", "--hidden", "8192", "--quant", "NVFP4"
    )
    assert code == 0
    lines = output.splitlines()
    assert lines[3] == "# 4 x 8192 of bfloat16: 64 KiB per rank, then residual, norm and nvfp4"
    decision = decide_fused(AllReduceConfig(), facts("h200_x4_nvswitch", 2), 4, 8192, "bfloat16", QuantKind.NVFP4)
    assert decision.launch is not None
    assert lines[4:6] == str(decision).splitlines()[:2]
    assert f"  launch: {decision.launch}" in lines

    code, output = run("--topology", H200, "--fused", "--dtype", "fp32")
    assert code == 0
    assert "all-reduce, then norm: two kernels\n  because only 16-bit types are fused, not float32\n" in output


def test_json_has_both_decisions() -> None:
    document = explained("--topology", H200, "--fused", "--tokens", "100", "--hidden", "2880", "--strategy", "oneshot")
    assert document["message"] == {
        "count": 288000, "dtype": "bfloat16", "bytes": 576000, "rows": 100, "hidden": 2880, "quant": None,
    }  # fmt: skip
    decision = document["decision"]
    assert (decision["runs"], decision["by_design"]) == ("ONESHOT (fused norm)", False)
    assert decision["launch"]["chunk_vectors"] == 100 * 360
    assert decision["all_reduce"]["strategy"] == "ONESHOT"
    off = explained("--topology", H200, "--fused", "--strategy", "NCCL")["decision"]
    assert (off["runs"], off["launch"]) == ("NCCL, then norm", None)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--quant", "fp8"], "--quant fp8: only norms are quantized: give --fused, too"),
        (["--fused", "--quant", "int4"], "--quant int4: must be one of fp8, fp8-token, fp8-group, nvfp4"),
        (["--fused", "--sweep"], "--sweep: not with --fused, which takes whole rows"),
        (["--fused", "--bytes", "64K"], "--bytes: not with --fused"),
        (["--fused", "--hidden", "100"], "rows of 100 elements; RMSNorm needs a multiple of 8"),
        (["--fused", "--hidden", "2880", "--quant", "fp8-group"], "quantization fp8-group needs a multiple of 128"),
    ],
)
def test_what_does_not_go_with_a_norm_is_named(arguments: list[str], complaint: str) -> None:
    result = RUNNER.invoke(app, ["explain", "--topology", H200, *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.replace("│", " ").split())


def test_the_sweep_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "sweep.png"
    code, output = run("--topology", H200, "--plot", str(picture))
    assert code == 0, output
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, output = run("--topology", H200, "--plot", str(tmp_path / "sweep.txt"))
    assert code == 2
    assert "error: " in output


def test_no_torch_is_needed() -> None:
    """What is decided is pure: a laptop with a topology file will do."""
    script = f"""
import sys
from llm_allreduce_plugin.cli import app
app(["explain", "--topology", {H200!r}, "--sweep"], standalone_mode=False)
app(["explain", "--topology", {H200!r}, "--fused"], standalone_mode=False)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, stdout=subprocess.DEVNULL)
