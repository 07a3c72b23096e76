"""The decode benchmarks of engines: which steps count, when a batch begins, and what makes a measurement void."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import (
    decode,
    engine_tables,
    pictures,
    plots,
    sglang_decode,
    sglang_engine,
    sglang_probe,
    tables,
    turns,
    vllm_probe,
)
from tests.conftest import MULTICAST_SWITCHES


def stamps(size: int, count: int, begin: float, every: float) -> list[tuple[float, int]]:
    return [(begin + every * number, size) for number in range(count)]


def test_steps_of_whole_batches_count() -> None:
    """Neither those of parts of a batch, nor those before or after it, nor the first and last ones."""
    warm_up = stamps(8, 30, 0.0, 5.0)
    parts = stamps(3, 40, 200.0, 0.5)
    slow_ends = [(219.9 + 7.0 * number, 8) for number in range(decode.NOT_COUNTED)]
    batch = stamps(8, 26, 289.9, 0.25)
    last = [(296.15 + 7.0 * (number + 1), 8) for number in range(decode.NOT_COUNTED)]
    found = sglang_engine.step_times([*warm_up, *parts, *slow_ends, *batch, *last], 8, 190.0, 400.0)
    assert found == pytest.approx([0.25] * 25)
    assert decode.milliseconds(found) == 250.0


def test_too_few_steps_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"batch 8: 20 steps of decode were stamped, more than 20 are needed"):
        sglang_engine.step_times(stamps(8, 2 * decode.NOT_COUNTED + 1, 0, 1), 8, 0, 100)


def test_a_batch_begins_when_it_is_complete() -> None:
    begun: set[str] = set()
    batch = [f"3-7-{number}" for number in range(3)]
    assert not sglang_probe.complete(batch[:2], begun)
    assert not sglang_probe.complete([*batch[:2], "3-8-0"], begun), "requests of the next batch are not of this one"
    assert sglang_probe.complete(batch, begun)
    assert sglang_probe.complete(batch[2:], begun), "what is left of a batch goes on"
    assert not sglang_probe.complete(["3-8-0"], begun)
    for name in ("HEALTH_CHECK_1", "0af3c2", "f3a0-1a-2"):
        assert sglang_probe.complete([name], begun), "requests that are not the benchmark's are not held"


@pytest.mark.parametrize(
    ("probe", "entry_points"), ((sglang_probe, "sglang.srt.plugins"), (vllm_probe, "vllm.general_plugins"))
)
def test_engines_find_the_probe(tmp_path: Path, probe: ModuleType, entry_points: str) -> None:
    source = Path(str(probe.__file__))
    decode.install_probe(tmp_path, source, entry_points)
    (found,) = importlib.metadata.Distribution.discover(path=[str(tmp_path)])
    (entry,) = found.entry_points
    assert (entry.group, entry.name) == (entry_points, decode.PROBE)
    module, _, function = entry.value.partition(":")
    script = f"import {module}; print({module}.__file__, callable({module}.{function}))"
    said = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**MULTICAST_SWITCHES, "PYTHONPATH": str(tmp_path)},
    ).stdout
    assert said.split() == [str(tmp_path / source.name), "True"]


def test_graphs_are_timed_on_the_rank_that_waits_for_nobody() -> None:
    ends = [9.0] * decode.NOT_COUNTED
    one, other = [7.0, 1.0, 5.0, 3.0, *ends], [9.0, 4.0, 2.0, 3.5, *ends]
    assert decode.graph_milliseconds([one, other], 3) == 2.0
    for ranks in ([one, other[1:]], [one[2:], other[2:]]):
        assert decode.graph_milliseconds(ranks, 3) is None


def test_the_probe_times_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events around each graph in its stream; a worker's method gives their times out, once."""
    clock = iter(range(100))

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = float(next(clock))

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Graph:
        def replay(self) -> None:
            for _ in range(2):
                next(clock)

    class Worker: ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    vllm_probe.time_graphs(Worker)
    for _ in range(3):
        torch.cuda.CUDAGraph().replay()
    worker: Any = Worker()
    assert getattr(worker, vllm_probe.GRAPH_MS)() == [3.0] * 3
    assert getattr(worker, vllm_probe.GRAPH_MS)() == []


def test_engines_that_are_there_at_once_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "turns"
    turns.begin(path)
    taken: list[int] = []
    ended: list[int] = []

    def engine(place: int) -> None:
        mine = turns.Turns(path, place, 3)
        time.sleep(0.02 * (3 - place))  # the first is the last to be ready
        for _ in range(4):
            with mine.next():
                taken.append(place)
                time.sleep(0.001)
                taken.append(place)
        mine.all_over(4)
        ended.append(len(taken))

    engines = [threading.Thread(target=engine, args=(place,)) for place in range(3)]
    for thread in engines:
        thread.start()
    for thread in engines:
        thread.join(10.0)
    assert taken == [0, 0, 1, 1, 2, 2] * 4
    assert ended == [len(taken)] * 3, "none ended while another had a turn to come"


def test_nobody_waits_for_an_engine_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "turns"
    turns.begin(path)
    second = turns.Turns(path, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(turns, "TURN_S", 0.01)
        with pytest.raises(TimeoutError, match=r"no turn within 0.01 s: 0 are over, and this is number 1 of 2"):
            second.all_over(1)
    turns.give_up(path, "default")
    with pytest.raises(RuntimeError, match="default takes no turn any more"), second.next():
        pass


def test_ratios_are_those_of_passes_side_by_side() -> None:
    """A machine that becomes half as fast for some passes changes both, and so no ratio."""

    def row(variant: str, start: int, times: list[float]) -> dict[str, Any]:
        return {"variant": variant, "start": start} | {f"passes_batch_{size}": times for size in decode.BATCHES}

    rows = [
        row("default", 0, [2.0, 4.0, 4.0]),
        row("AUTO", 0, [1.8, 3.6, 3.6]),
        row("default", 1, [2.0, 2.0, 4.0]),
        row("AUTO", 1, [1.8, 1.8, 3.6]),
        row("AUTO", 2, [9.0, 9.0, 9.0]),  # the stock engine of that start has failed
    ]
    found = turns.ratios(rows, decode.BATCHES, decode.STOCK)
    assert found == {"AUTO": dict.fromkeys(map(str, decode.BATCHES), 0.9)}


def test_two_benchmarks_do_not_take_their_times_at_once(tmp_path: Path) -> None:
    lock = str(tmp_path / "quiet")
    waiting = threading.Event()

    def measure() -> None:
        with decode.alone(lock):
            waiting.set()

    other = threading.Thread(target=measure)
    with decode.alone(lock):
        other.start()
        assert not waiting.wait(0.3)
    assert waiting.wait(10)
    other.join()
    with decode.alone(None), decode.alone(None):
        pass


FUSION = "all-reduce fusion: 3 layer boundaries are one call each (3 with RMSNorm); one kernel or two by size and type"
OVER = "all-reduce over 2 ranks (shm memory, allreduce_strategy AUTO, sizes per rank): ONESHOT"


def answer(*calls: str, log: tuple[str, ...] = (OVER,), ranks: int = 2) -> dict[str, Any]:
    return {"log": list(log), "reports": [{"calls": dict.fromkeys(calls, 5)} for _ in range(ranks)]}


@pytest.mark.parametrize(
    ("variant", "found"),
    [
        ("default", answer(ranks=0, log=())),
        ("AUTO", answer("ONESHOT", "ONESHOT (fused norm)")),
        ("AUTO", answer("ONESHOT", "ONESHOT, then norm")),
        ("AUTO-unfused", answer("ONESHOT")),
    ],
)
def test_variants_that_are_what_they_say(variant: str, found: dict[str, Any]) -> None:
    sglang_decode.check_variant(variant, 2, found)


@pytest.mark.parametrize(
    ("variant", "found", "fault"),
    [
        ("default", answer(ranks=0), "this package ran in SGLang's own variant"),
        ("default", answer("ONESHOT", log=()), "this package ran in SGLang's own variant"),
        ("AUTO", answer("ONESHOT"), "layer boundaries were not fused"),
        ("AUTO-unfused", answer("ONESHOT", "ONESHOT (fused norm)"), "layer boundaries were fused"),
        ("AUTO", answer(), "2 of 2 ranks report calls"),
        ("AUTO", answer("ONESHOT (fused norm)", ranks=1), "1 of 2 ranks report calls"),
    ],
)
def test_variants_that_are_not(variant: str, found: dict[str, Any], fault: str) -> None:
    with pytest.raises(RuntimeError, match=fault):
        sglang_decode.check_variant(variant, 2, found)


def test_lines_of_a_log() -> None:
    log = f"""
[2026-11-26 09:00:00 TP0] {OVER}
[2026-11-26 09:00:01 TP0] Load weight end.
[2026-11-26 09:00:02 TP0] {FUSION}
[2026-11-26 09:00:02 TP1] {FUSION}
"""
    assert decode.said_in(log) == [OVER, FUSION]


def test_tokens_that_differ_are_a_failure() -> None:
    one, other = [[1, 2], [3, 4]], [[1, 2], [3, 5]]
    row, equal = sglang_decode.compare({"default": [other], "ONESHOT": [one, one], "TWOSHOT": [one, one]}, 2, 2)
    assert equal
    assert row["same_tokens_oneshot_twoshot"] == 2
    assert row["same_tokens_as_default"] == {"ONESHOT": 1, "TWOSHOT": 1}
    assert row["different_tokens"] == {"default": 4, "ONESHOT": 4, "TWOSHOT": 4}
    assert not sglang_decode.compare({"ONESHOT": [one], "TWOSHOT": [other]}, 2, 2)[1]
    row, equal = sglang_decode.compare({"AUTO": [one, other]}, 2, 2)
    assert not equal
    assert row["same_tokens_in_every_start"] == {"AUTO": 1}


def test_an_engine_that_fails_shows_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such flag')"]
    with pytest.raises(RuntimeError, match="(?s)AUTO failed:.*no such flag"):
        decode.run_process("AUTO", command, dict(os.environ), tmp_path / "log", tmp_path / "result", 60)


def test_an_engine_that_takes_too_long_leaves_nothing_behind(tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", "sleep 300 & echo $!; wait"]
    with pytest.raises(subprocess.TimeoutExpired):
        decode.run_process("AUTO", command, dict(os.environ), tmp_path / "log", tmp_path / "result", 2)
    pid = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[-1][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_settings_of_variants() -> None:
    fused = {"allreduce_strategy": "AUTO", "report_dir": "reports", "fuse_norm": True}
    assert decode.settings_of("AUTO", "reports") == fused
    assert decode.settings_of("AUTO-unfused", "reports") == fused | {"fuse_norm": False}


def test_the_model_fits_its_width(tmp_path: Path) -> None:
    for width, heads in ((4096, 8), (256, 2)):
        decode.write_model(tmp_path, width, 2)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["num_key_value_heads"] == heads
        assert config["num_attention_heads"] * config["head_dim"] == width


def test_graphs_are_captured_for_what_is_measured() -> None:
    assert sglang_engine.engine_arguments("cuda")["cuda_graph_bs_decode"] == list(decode.BATCHES)
    assert "cuda_graph_bs_decode" not in sglang_engine.engine_arguments("cpu")


def made_up(width: int) -> dict[str, Any]:
    """A record as the benchmark writes it: two starts of each variant."""
    rows = [
        {"tp": 2, "variant": variant, "start": start, "version": "0.5.17"}
        | {f"ms_per_token_batch_{size}": round(base + size / 100 + start / 1000, 3) for size in decode.BATCHES}
        for start in (0, 1)
        for variant, base in (("default", 2.0), ("AUTO-unfused", 1.9), ("AUTO", 1.8))
    ]
    return {"environment": {"gpus": "2 x NVIDIA H100"}, "width": width, "layers": 16, "rows": rows}


def test_the_page_is_filled_from_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "benchmarks" / "h100"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert engine_tables.sglang() == "Not measured yet.\n"
    (folder / "sglang_4096_tp2.json").write_text(json.dumps(made_up(4096)))
    one_of_two = engine_tables.sglang()
    assert one_of_two.count("| AUTO, norm fused | 1.810 | 1.880 | 2.120 | 3.080 |") == 1
    assert "8192" not in one_of_two
    assert ".png" not in one_of_two, "the picture is of both"
    (folder / "sglang_8192_tp2.json").write_text(json.dumps(made_up(8192)))
    page = engine_tables.sglang()
    assert f"(plots/{engine_tables.SGLANG_PICTURE}.png)" in page
    assert engine_tables.SGLANG_PICTURE in plots.WANTED
    assert page.count("| AUTO, norm fused | 1.810 | 1.880 | 2.120 | 3.080 |") == 2
    assert page.count("| stock SGLang | 2.011 | 2.081 | 2.321 | 3.281 |") == 2, "a line to each start"
    assert "same tokens" not in page
    row = sglang_decode.compare({"default": [[[1], [2]]], "ONESHOT": [[[1], [3]]], "TWOSHOT": [[[1], [3]]]}, 2, 2)[0]
    (folder / "sglang_tokens_tp2.json").write_text(json.dumps({"rows": [{"tp": 2, "variant": "default"}, row]}))
    said = "Of 2 requests, 2 had the same tokens with `ONESHOT` and `TWOSHOT`, and 1 the tokens of stock SGLang, too"
    assert said in engine_tables.sglang()


def test_the_picture_shows_every_variant() -> None:
    figure = Figure()
    pictures.sglang_ms_per_token(figure, [made_up(4096), made_up(8192)])
    for axes, width in zip(figure.axes, (4096, 8192), strict=True):
        assert axes.get_title() == f"Llama {width} wide x 16 layers"
        heights = [[round(bar.get_height(), 4) for bar in bars] for bars in axes.containers]
        means = [2.0 + 0.0005 + size / 100 for size in decode.BATCHES]
        assert heights == [[round(mean - saved, 4) for mean in means] for saved in (0, 0.1, 0.2)]
