"""Starts of engines: alone, or all at once with the options of their turns."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decode, turns, vllm_decode, vllm_engine
from benchmarks.starts import start_all


def test_one_after_another() -> None:
    running: list[str] = []

    def run(variant: str, options: tuple[str, ...]) -> dict[str, Any]:
        assert (running, options) == ([], ())
        running.append(variant)
        if variant == "two":
            running.clear()
            message = "two failed"
            raise RuntimeError(message)
        running.clear()
        return {"variant": variant}

    found = list(start_all(["one", "two", "three"], None, run))
    assert [name for name, _ in found] == ["one", "two", "three"]
    assert found[0][1] == {"variant": "one"}
    assert str(found[1][1]) == "two failed"
    assert found[2][1] == {"variant": "three"}


def test_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "turns"
    all_there = threading.Barrier(3, timeout=10.0)

    def run(variant: str, options: tuple[str, ...]) -> dict[str, Any]:
        all_there.wait()
        if variant == "two":
            message = "two failed"
            raise RuntimeError(message)
        return {"options": options}

    (_, first), (_, failed), (_, third) = start_all(["one", "two", "one"], path, run)
    assert isinstance(first, dict)
    assert isinstance(third, dict)
    assert first["options"] == ("--turns", str(path), "--place", "0", "--count", "3")
    assert third["options"][3] == "2"
    assert isinstance(failed, RuntimeError)
    with (
        pytest.raises(RuntimeError, match="two takes no turn any more"),
        turns.Turns(path, 2, 3).next(),
    ):
        pass


def of_engine(variant: str, **others: Any) -> argparse.Namespace:
    others = {"turns": None, "quantization": None, "no_peer_access": False, "profile": None, "report": "r"} | others
    return argparse.Namespace(variant=variant, **others)


def test_engines_that_share_gpus_do_not_measure_memory() -> None:
    alone = vllm_engine.engine_arguments(of_engine("default"))
    assert alone["gpu_memory_utilization"] == vllm_engine.MEMORY
    assert "kv_cache_memory_bytes" not in alone
    shared = vllm_engine.engine_arguments(of_engine("default", turns=Path("turns")))
    assert shared["kv_cache_memory_bytes"] == vllm_engine.KEYS_AND_VALUES_BYTES
    assert shared["gpu_memory_utilization"] < 0.1


def test_only_our_variants_have_our_settings() -> None:
    assert "additional_config" not in vllm_engine.engine_arguments(of_engine("default"))
    ours = vllm_engine.engine_arguments(of_engine("MINLATENCY-unfused", no_peer_access=True))
    assert ours["additional_config"]["allreduce"] == {
        "allreduce_strategy": "MINLATENCY",
        "report_dir": "r",
        "fuse_norm": False,
        "transport": "host",
    }


def test_a_record_has_every_pass() -> None:
    steps = {size: [[0.001, 0.003, 0.002], [0.004, 0.004, 0.004]] for size in decode.BATCHES}
    graphs: dict[int, list[float | None]] = {size: [2.0, None] for size in decode.BATCHES}
    graphs[8] = [None, None]
    found = vllm_engine.summary(steps, graphs)
    assert found["passes_batch_8"] == [2.0, 4.0]
    assert found["ms_per_token_batch_8"] == 3.5
    assert found["steps_batch_8"] == 6
    assert (found["gpu_ms_batch_1"], found["gpu_ms_batch_8"]) == (2.0, None)


def test_oneshot_and_twoshot_must_agree() -> None:
    rows, equal = vllm_decode.compare({"ONESHOT": [[1], [2]], "TWOSHOT": [[1], [3]]}, 2, 2)
    assert not equal
    assert rows == [
        {"tp": 2, "requests": 2, "same_tokens_as_ONESHOT": {"TWOSHOT": 1}},
        {"tp": 2, "requests": 2, "same_tokens_oneshot_twoshot": 1},
    ]
    assert vllm_decode.compare({"default": [[1], [2]], "AUTO": [[1], [3]]}, 2, 2)[1]


def test_passes_that_have_no_time_are_left_out_of_ratios() -> None:
    rows = [
        {"start": 0, "variant": "default", "gpu_passes_batch_1": [2.0, None, 4.0], "gpu_passes_batch_8": [None] * 3},
        {"start": 0, "variant": "AUTO", "gpu_passes_batch_1": [1.0, 1.0, 4.0], "gpu_passes_batch_8": [1.0] * 3},
    ]
    assert turns.ratios(rows, (1, 8), "default", "gpu_passes") == {"AUTO": {"1": 0.75, "8": None}}
