"""vLLM's processes and groups of two with this plugin: of the version that is installed, and of others unpacked."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from llm_allreduce_plugin.profiles.file import store
from llm_allreduce_plugin.topology import NodeIdentity
from tests.support.packages import INSTALLED, name_of
from tests.support.profiles import entry
from tests.support.vllm_packages import PACKAGES, run_module

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

STOCK = "CpuCommunicator"
OURS = f"AllReduceCommunicator[{STOCK}]"
packages = pytest.mark.parametrize("package", PACKAGES, ids=name_of)


@functools.cache
def seen_with(package: str, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """What the parts of ``tests.support.vllm_groups`` say in that version, and its log.

    In one process: importing vLLM takes longest.
    """
    profile = folder / "profile.json"
    cpu_ranks = {"world_size": 2, "transport": "shm", "topology_class": "cpu", "in_band": False}
    store(profile, NodeIdentity.of_cpu(), [entry(eager=[(None, "TWOSHOT")], **cpu_ranks)])
    parts = ["registration", "groups", *(["compiled"] if package == INSTALLED else [])]
    words = ("tests.support.vllm_groups", str(folder), str(profile), *parts)
    result = run_module(package, *words, OMP_NUM_THREADS="1", VLLM_CACHE_ROOT=str(folder / "cache"))
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"part"')]
    return lines, result.stdout + result.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {package: tmp_path_factory.mktemp(name_of(package)) for package in PACKAGES}


def said(package: str, folders: dict[str, Path], part: str) -> list[dict[str, Any]]:
    return [line for line in seen_with(package, folders[package])[0] if line["part"] == part]


@packages
def test_registration_in_a_real_vllm_process(package: str, folders: dict[str, Path]) -> None:
    """Entry point found, idempotent, no CUDA; the factory replaces the path and knows the stock one."""
    (seen,) = said(package, folders, "registration")
    assert package == INSTALLED or seen["version"] == name_of(package)
    assert seen["stock"].endswith(f"cpu_communicator.{STOCK}")


@packages
def test_the_flag_against_custom_all_reduce_in_a_real_vllm_config(package: str, folders: dict[str, Path]) -> None:
    """On a platform that has such kernels, as GPUs do; on CPU ranks vLLM sets the flag itself, and it means nothing."""
    assert "--disable-custom-all-reduce was given" in said(package, folders, "registration")[0]["reason"]


@packages
def test_plugin_not_named_leaves_vllm_alone(package: str, folders: dict[str, Path]) -> None:
    assert said(package, folders, "alone")[0]["stock"].endswith(f"cpu_communicator.{STOCK}")


@packages
def test_only_tensor_parallel_groups_get_our_class(package: str, folders: dict[str, Path]) -> None:
    """Real processes, real vLLM groups, TP 2 beside others; AUTO goes by the profile of vLLM's configuration."""
    found = {(line["strategy"], line["rank"]): (line["tp"], line["world"]) for line in said(package, folders, "groups")}
    strategies = ("ONESHOT", "TWOSHOT", "NCCL", "AUTO", "UB")
    assert found == {(name, rank): (STOCK if name == "NCCL" else OURS, STOCK) for name in strategies for rank in (0, 1)}
    log = seen_with(package, folders[package])[1]
    lines = [line for line in log.splitlines() if "these sizes come from" in line]
    assert len(lines) == 1
    assert f"these sizes come from profile {folders[package] / 'profile.json'}, measured 2025-01-02" in lines[0]


def test_a_compiled_model_in_16_bits(folders: dict[str, Path]) -> None:
    """Through vLLM's compiler and passes, the norm in the kernel of the sum; unfused, UB has its outputs registered.

    The demo serves fp32, which takes two kernels. ``tests.support.vllm_groups`` compares values.
    """
    by_strategy = {(line["strategy"], line["rank"]): line for line in said(INSTALLED, folders, "compiled")}
    fusion = {"ONESHOT": ["2 of 2 all-reduces of a compiled graph are fused (2 with RMSNorm)",
                          "2 layer boundaries are one call each (2 with RMSNorm); one kernel or two by size and type"],
              "UB": ["layer boundaries are not fused: fuse_norm is off"]}  # fmt: skip
    calls = {"ONESHOT": {"ONESHOT (fused norm)": 6}, "UB": {"UB": 6}}
    for strategy, lines in fusion.items():
        for rank in (0, 1):
            seen = by_strategy[strategy, rank]
            assert seen["lines"] == ([f"all-reduce fusion: {line}" for line in lines] if rank == 0 else [])
            assert (seen["calls"], seen["fallbacks"]) == (calls[strategy], {})
            pool = seen["registered_memory"]
            assert (pool and (pool["stayed"], pool["copied_out"])) == (None if strategy == "ONESHOT" else (6, 0))
