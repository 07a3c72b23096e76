"""A real server of vLLM or SGLang at tensor parallel 2 with this package's all-reduce.

Writes a small model with seeded random weights, serves it, asks for a completion over HTTP, compares the tokens with
Hugging Face's on the same weights, and prints what the workers report, and how many layer boundaries were fused (by
vLLM in compiled graphs: on GPUs, and with --compile). Leaves no process behind, whatever happens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.demo.engines import ENGINES, Engine
from llm_allreduce_plugin.demo.model import LAYERS, NEW_TOKENS, PROMPT, make_model, reference_tokens
from llm_allreduce_plugin.demo.server import (
    DemoError,
    end_of,
    free_port,
    group_is_alive,
    http,
    say,
    server,
    stop,
    wait_for_health,
)

__all__ = [
    "LAYERS",
    "NEW_TOKENS",
    "PROMPT",
    "DemoError",
    "free_port",
    "group_is_alive",
    "http",
    "make_model",
    "reference_tokens",
    "server",
    "server_setup",
    "stop",
    "wait_for_health",
]


def read_metrics(url: str) -> dict[str, float]:
    """This package's counters at the server's metrics endpoint: the sample, and its value."""
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310  (the demo's own server)
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line.startswith("llm_allreduce_"))
    return {name: float(value) for name, _, value in samples}


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """What the workers have left in their ``report_dir``."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def print_reports(reports: list[dict[str, Any]]) -> None:
    """In a line for each rank."""
    for report in reports:
        done = [f"{name} {calls} calls" for name, calls in report["calls"].items()]
        done += [f"{name} {calls} calls captured into graphs" for name, calls in report.get("captured", {}).items()]
        say(f"rank {report['rank']} reports: {', '.join(done) or report.get('note', 'no calls')}")
    say(f"strategy by size: {reports[0]['sizes']}")
    for fallback, reason in reports[0].get("fallbacks", {}).items():
        say(f"fallback: {fallback}: {reason}")


def check_reports(strategy: str, reports: list[dict[str, Any]]) -> None:
    """The demo must not pass with an all-reduce that never ran."""
    if len(reports) != 2:  # noqa: PLR2004
        message = f"{len(reports)} of 2 workers left a report"
        raise DemoError(message)
    if strategy in ("ONESHOT", "TWOSHOT"):
        for report in reports:
            # With norms fused, too: "ONESHOT (fused norm)".
            ran = {**report.get("captured", {}), **report["calls"]}
            if not any(name.split(" ")[0].rstrip(",") == strategy for name in ran):
                message = f"rank {report['rank']} never ran {strategy}: {report}"
                raise DemoError(message)


def check_fusion(wanted: int | None, log: str) -> None:
    """Say what the log says about layer boundaries. ``wanted``: how many must be one call each."""
    lines = [line[line.index("all-reduce fusion: ") :] for line in log.splitlines() if "all-reduce fusion: " in line]
    for line in dict.fromkeys(lines):
        say(f"the log says: {line}")
    if wanted is not None and not any(f" {wanted} layer boundaries are one call each" in line for line in lines):
        message = f"not all of the {wanted} layer boundaries are one call"
        raise DemoError(message)


def server_setup(
    strategy: str, work: Path, model: Path, port: int, *, compiled: bool = False, engine: str = "vllm"
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a server."""
    return ENGINES[engine].server_setup(strategy, work, model, port, compiled=compiled)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server has answered, and what its workers had counted by then."""

    text: str
    tokens: list[int]
    expected: list[int]  # of Hugging Face, from the same weights
    seconds: float
    reports: list[dict[str, Any]]
    counters: dict[str, float]
    url: str
    log: Path


# Of a server that ends while it is asked: no connection, or an answer that breaks off.
_NO_ANSWER = (OSError, HTTPException)


def _silent(error: BaseException, log: Path) -> DemoError:
    """What is said of a server that has ended instead of answering. The log is told here: it may not be kept."""
    return DemoError(f"the server did not answer: {error!r}\nthe end of its log:\n{end_of(log)}")


@contextlib.contextmanager
def served(engine: Engine, strategy: str, work: Path, *, compiled: bool = False) -> Iterator[Answer]:
    """A server that has answered the prompt, and runs inside of the block. Everything that it needs goes into ``work``.

    Raises:
        DemoError: the server does not start, or does not answer.
    """
    model = work / "model"
    say("writing a small Llama with seeded random weights")
    make_model(model)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command, environment = engine.server_setup(strategy, work, model, port, compiled=compiled)
    log = work / "server.log"
    say(f"{engine.command} on port {port}, allreduce_strategy {strategy}; up to a minute or two; log: {log}")
    started = time.monotonic()
    with server(command, environment, log) as process:
        expected = reference_tokens(model)  # while it starts
        wait_for_health(process, f"{url}/health", log)
        say(f"healthy after {time.monotonic() - started:.0f} s")
        asked = time.monotonic()
        try:
            text, tokens = engine.ask(url, PROMPT, NEW_TOKENS)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            message = f"the server answered {error.code}: {said}\nthe end of its log:\n{end_of(log)}"
            raise DemoError(message) from None
        except _NO_ANSWER as error:
            raise _silent(error, log) from None
        seconds = time.monotonic() - asked
        time.sleep(1.5)  # the workers write their reports some times a second
        reports = read_reports(work / "report")
        try:
            counters = read_metrics(f"{url}/metrics")
        except _NO_ANSWER as error:
            raise _silent(error, log) from None
        yield Answer(text, tokens, expected, seconds, reports, counters, url, log)


def judge(engine: Engine, strategy: str, answer: Answer, *, compiled: bool = False) -> None:
    """Say what a server that has ended did, and whether that is what it should do.

    Raises:
        DemoError: it is not: other tokens, another strategy, or boundaries that are not fused.
    """
    say(f"prompt: {PROMPT!r}")
    say(f"text:   {answer.text!r}")
    say(f"tokens: {answer.tokens}")
    say(f"{len(answer.tokens)} tokens in {answer.seconds:.2f} s")
    check_reports(strategy, answer.reports)
    print_reports(answer.reports)
    for sample, value in answer.counters.items():
        if "_total{" in sample:
            say(f"/metrics: {sample} {value:g}")
    wanted = None if strategy == "NCCL" else engine.boundaries(LAYERS, compiled=compiled)
    log = answer.log.read_text(errors="replace")
    check_fusion(wanted, log)
    for line in log.splitlines():
        if "all-reduce summary: " in line:
            say(f"at the end, the log says: {line[line.index('all-reduce summary: ') :]}")
    if answer.tokens != answer.expected:
        message = f"Hugging Face generates other tokens from the same weights: {answer.expected}"
        raise DemoError(message)
    say("Hugging Face generates the same tokens from the same weights")


def run(engine: Engine, strategy: str, work: Path, tokens_file: Path | None, *, compiled: bool) -> None:
    """Serve, ask, and compare.

    Raises:
        DemoError: the server does not start, or does something else than it should.
    """
    with served(engine, strategy, work, compiled=compiled) as answer:
        pass
    judge(engine, strategy, answer, compiled=compiled)
    if tokens_file is not None:
        tokens_file.write_text(json.dumps(answer.tokens))


def choices(words: list[str]) -> tuple[str, Engine]:
    """The strategy and the engine, which may come in either order.

    Raises:
        ValueError: a word is neither, or there are two of a kind.
    """
    engines = [word for word in words if word.lower() in ENGINES]
    strategies = [word for word in words if word.lower() not in ENGINES]
    for several in (engines, strategies):
        if len(several) > 1:
            message = f"{' and '.join(several)}: give one strategy and one engine ({' or '.join(ENGINES)})"
            raise ValueError(message)
    try:
        strategy = str(AllReduceStrategy.parse(*strategies)) if strategies else "ONESHOT"
    except ValueError as error:
        message = f"{strategies[0]!r}: {error}; or an engine: {' or '.join(ENGINES)}"
        raise ValueError(message) from None
    return strategy, ENGINES[engines[0].lower() if engines else "vllm"]


def demo(words: list[str], *, compiled: bool = False, tokens_file: Path | None = None, keep: bool = False) -> int:
    """All of it, ended by Ctrl-C and by SIGTERM and SIGHUP in order; returns the exit code.

    Args:
        words: a strategy, an engine, both or none of them.
        compiled: let vLLM compile the model on CPU ranks, too, as it does on GPUs.
        tokens_file: where the generated token ids go.
        keep: keep model, log and reports.
    """
    try:
        strategy, engine = choices(words)
    except ValueError as error:
        say(str(error))
        return 2
    if (missing := engine.missing()) is not None:
        say(f"FAILED: {missing}")
        return 1
    _unwind_on_signals()
    work = Path(tempfile.mkdtemp(prefix="llm-allreduce-demo-"))
    try:
        run(engine, strategy, work, tokens_file, compiled=compiled)
    except DemoError as error:
        say(f"FAILED: {error}")
        keep = True
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    finally:
        if keep:
            say(f"kept: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    say("done")
    return 0


def _unwind_on_signals() -> None:
    """Ctrl-C and a polite kill unwind through all ``finally`` clauses: a server takes longer to end than a command."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))
