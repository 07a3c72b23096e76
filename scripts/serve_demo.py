"""A real server of vLLM or SGLang at tensor parallel 2 with this package's all-reduce; the driver behind serve_demo.sh.

Writes a small model with seeded random weights, serves it, asks for a completion over HTTP, compares the tokens with
Hugging Face's on the same weights, and prints what the workers report, and how many layer boundaries were fused (by
vLLM in compiled graphs: on GPUs, and with --compile). Leaves no process behind, whatever happens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.demo_engines import ENGINES, Engine
from scripts.demo_server import (
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

PROMPT = "The quick brown fox jumps over the lazy dog."
NEW_TOKENS = 24
LAYERS = 4


def make_model(folder: Path) -> None:
    """A small Llama, 256 wide, with weights from a fixed seed and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)

    torch.manual_seed(22)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        initializer_range=0.3,  # wide, so that the most likely token leads by more than rounding
    )
    LlamaForCausalLM(config).to(torch.float32).eval().save_pretrained(folder)


def reference_tokens(folder: Path) -> list[int]:
    """What Hugging Face generates greedily from the same weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.no_grad():
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=1
        )
    return [int(token) for token in output[0, prompt.shape[1] :]]


def read_metrics(url: str) -> dict[str, float]:
    """This package's counters at the server's metrics endpoint: the sample, and its value."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line.startswith("llm_allreduce_"))
    return {name: float(value) for name, _, value in samples}


def read_reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def print_reports(reports: list[dict[str, Any]]) -> None:
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
    """Say what the log says about layer boundaries. ``wanted``: how many must have been fused."""
    lines = [line[line.index("all-reduce fusion: ") :] for line in log.splitlines() if "all-reduce fusion: " in line]
    for line in dict.fromkeys(lines):
        say(f"the log says: {line}")
    if wanted is not None and not any(f" {wanted} layer boundaries fused" in line for line in lines):
        message = f"not all of the {wanted} layer boundaries were fused"
        raise DemoError(message)


def server_setup(
    strategy: str, work: Path, model: Path, port: int, *, compiled: bool = False, engine: str = "vllm"
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a server."""
    return ENGINES[engine].server_setup(strategy, work, model, port, compiled=compiled)


def run(engine: Engine, strategy: str, work: Path, tokens_file: Path | None, *, compiled: bool) -> None:
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
        seconds = time.monotonic() - asked
        time.sleep(1.5)  # the workers write their reports some times a second
        reports = read_reports(work / "report")
        counters = read_metrics(f"{url}/metrics")
    say(f"prompt: {PROMPT!r}")
    say(f"text:   {text!r}")
    say(f"tokens: {tokens}")
    say(f"{len(tokens)} tokens in {seconds:.2f} s")
    check_reports(strategy, reports)
    print_reports(reports)
    for sample, value in counters.items():
        if "_total{" in sample:
            say(f"/metrics: {sample} {value:g}")
    wanted = None if strategy == "NCCL" else engine.boundaries(LAYERS, compiled=compiled)
    check_fusion(wanted, log.read_text(errors="replace"))
    for line in log.read_text(errors="replace").splitlines():
        if "all-reduce summary: " in line:
            say(f"at the end, the log says: {line[line.index('all-reduce summary: ') :]}")
    if tokens != expected:
        message = f"Hugging Face generates other tokens from the same weights: {expected}"
        raise DemoError(message)
    say("Hugging Face generates the same tokens from the same weights")
    if tokens_file is not None:
        tokens_file.write_text(json.dumps(tokens))


def choices(words: list[str]) -> tuple[str, Engine]:
    """The strategy and the engine, which may come in either order.

    Raises:
        ValueError: a word is neither, or there are two of a kind.
    """
    from llm_allreduce_plugin import AllReduceStrategy

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="STRATEGY|ENGINE", help="ONESHOT and vllm unless given")
    parser.add_argument("--compile", action="store_true", help="vLLM: compile the model on CPU ranks, too, as on GPUs")
    parser.add_argument("--tokens", type=Path, help="write the generated token ids to this file")
    parser.add_argument("--keep", action="store_true", help="keep model, log and reports")
    arguments = parser.parse_intermixed_args()
    try:
        strategy, engine = choices(arguments.words)
    except ValueError as error:
        say(str(error))
        return 2
    # Ctrl-C and a polite kill both unwind through the finally clauses above.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = Path(tempfile.mkdtemp(prefix="llm-allreduce-demo-"))
    try:
        run(engine, strategy, work, arguments.tokens, compiled=arguments.compile)
    except DemoError as error:
        say(f"FAILED: {error}")
        arguments.keep = True
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    finally:
        if arguments.keep:
            say(f"kept: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
