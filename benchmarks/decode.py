"""What the decode benchmarks of both engines share: the model, the prompts, the variants and how they start."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import turns

BATCHES = (1, 8, 32, 128)
NOT_COUNTED = 10  # steps at either end of a run
STOCK = "default"
UNFUSED = "unfused"
PLUGIN = "llm_allreduce"
PROBE = "decode_probe"


def write_model(folder: Path, width: int, layers: int) -> None:
    """The configuration of a Llama of that width, a multiple of 128. Its weights are the engine's dummy ones."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": min(8, width // 128),
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 500000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))


def prompts(generator: random.Random, count: int, shortest: int, longest: int) -> list[list[int]]:
    """Token ids of ``count`` prompts, each of ``shortest`` to ``longest`` tokens."""
    return [[generator.randrange(3, 32000) for _ in range(generator.randint(shortest, longest))] for _ in range(count)]


def settings_of(variant: str, report: str) -> dict[str, Any]:
    """Our settings for ``STRATEGY`` or ``STRATEGY-unfused``. ``report``: the folder of the ranks' reports."""
    strategy, _, norm = variant.partition("-")
    return {"allreduce_strategy": strategy, "report_dir": report, "fuse_norm": norm != UNFUSED}


@contextlib.contextmanager
def alone(lock: str | None) -> Iterator[None]:
    """Hold the file ``lock``, if one is named: two benchmarks on one machine then do not take their times at once."""
    if lock is None:
        yield
        return
    with Path(lock).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def install_probe(folder: Path, source: Path, entry_points: str) -> None:
    """A folder for ``PYTHONPATH`` in which an engine finds ``source`` as a plugin named ``PROBE``."""
    shutil.copy(source, folder)
    about = folder / f"{PROBE}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PROBE}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{entry_points}]\n{PROBE} = {source.stem}:register\n")


def python_path(folder: Path) -> str:
    """``PYTHONPATH`` with a folder ahead of what it has."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))


def said_in(log: str) -> list[str]:
    """Lines of ours in an engine's log, without time and rank, each once."""
    found = re.findall(r"(?:all-reduce fusion: |all-reduce over |all-reduce summary: |SGLang \S+ is left alone).*", log)
    return list(dict.fromkeys(line.strip() for line in found))


def milliseconds(seconds: Sequence[float]) -> float:
    """The median, in milliseconds."""
    return round(statistics.median(seconds) * 1000, 3)


def engine_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that the process of one engine has, whichever it is."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("--variant", "--model", "--result", "--report"):
        parser.add_argument(name, required=True)
    for name in ("--tp", "--requests"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--passes", type=int)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--quiet")
    turns.add_options(parser)
    return parser


def of_passes(size: int, passes: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What a record has of the steps of a batch of ``size``, in seconds: of all passes, and of each."""
    return {
        f"ms_per_token_batch_{size}": milliseconds(list(itertools.chain.from_iterable(passes))),
        f"passes_batch_{size}": [milliseconds(times) for times in passes],
        f"steps_batch_{size}": sum(map(len, passes)),
    }


def run_process(
    name: str, command: Sequence[str], environment: dict[str, str], log: Path, result: Path, timeout_s: float
) -> dict[str, Any]:
    """Run one engine to its end and return what it wrote to ``result``. No process of it is left behind.

    Raises:
        RuntimeError: it wrote nothing; the message ends with the last lines of ``log``.
        subprocess.TimeoutExpired: it took longer than ``timeout_s``.
    """
    with log.open("wb") as sink:
        process = subprocess.Popen(  # noqa: S603
            command, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        process.wait(timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not result.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        message = f"{name} failed:\n{tail}"
        raise RuntimeError(message)
    answer: dict[str, Any] = json.loads(result.read_text())
    return answer


def exit_on_sigterm() -> None:
    """End by an exception when somebody else's time limit ends this process, so that its engine ends, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def reports_in(folder: Path) -> list[dict[str, Any]]:
    """The reports of the ranks, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def equal_requests(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> int:
    """How many requests have the same tokens in both."""
    return sum(a == b for a, b in zip(one, other, strict=True))


def graph_milliseconds(ranks: Sequence[Sequence[float]], steps: int) -> float | None:
    """The median time of the newest ``steps`` graphs but NOT_COUNTED, of each on the rank where it was the shortest.

    ``ranks``: of each rank the milliseconds of its graphs, the newest last. None: ranks ran different numbers of them,
    or too few, so that a step is no graph.
    """
    counts = {len(graphs) for graphs in ranks}
    if len(counts) != 1 or min(counts) < steps + NOT_COUNTED:
        return None
    shortest = [min(times) for times in zip(*ranks, strict=True)]
    median: float = statistics.median(shortest[-steps - NOT_COUNTED : -NOT_COUNTED])
    return round(median, 3)


def times_of(row: dict[str, Any], what: str = "ms_per_token") -> str:
    """The milliseconds per token of a row, or ``what`` else was measured at each batch size, for a table."""
    times = (row[f"{what}_batch_{size}"] for size in BATCHES)
    return "  ".join(f"{'-':>7}" if time is None else f"{time:>7.3f}" for time in times)
