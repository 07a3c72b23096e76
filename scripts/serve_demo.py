"""A real `vllm serve` at tensor parallel 2 with this package's all-reduce; the driver behind serve_demo.sh.

Writes a small model with seeded random weights, serves it, asks for a completion over HTTP, compares the tokens with
Hugging Face's on the same weights, and prints what the workers report, and how many layer boundaries were fused (in
compiled graphs: on GPUs, and with --compile). Leaves no process behind, whatever happens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The quick brown fox jumps over the lazy dog."
NEW_TOKENS = 24
LAYERS = 4
# Each layer has two all-reduces before a norm; the sum over the vocabulary's parts comes before the first one.
BOUNDARIES = 2 * LAYERS + 1
STARTUP_LIMIT_S = 600
STOP_LIMIT_S = 30


class DemoError(Exception):
    """The demo cannot go on; the text is for the user."""


def say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def http(url: str, body: dict[str, Any] | None = None, timeout: float = 120) -> Any:  # noqa: ANN401
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text = answer.read().decode()
    return json.loads(text) if text else None


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def group_is_alive(group: int) -> bool:
    """True while any process of the server's session lives: workers outlive their parent for a moment."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the server's whole process group, and end what is left of it after a while."""
    for number, patience in ((signal.SIGINT, STOP_LIMIT_S), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        if process.poll() is None or group_is_alive(process.pid):
            if number == signal.SIGINT:
                process.send_signal(number)  # the front end first: it winds its workers down
            else:
                _signal_group(process, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            process.poll()
            if not group_is_alive(process.pid):
                return
            time.sleep(0.1)


@contextlib.contextmanager
def server(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink:
        process = subprocess.Popen(  # noqa: S603
            command, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            say("stopping the server")
            stop(process)


def end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def wait_for_health(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            message = f"the server ended with code {process.returncode}; the end of its log:\n{end_of(log)}"
            raise DemoError(message)
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            http(url, timeout=2)
            return
        time.sleep(0.5)
    message = f"the server was not healthy within {STARTUP_LIMIT_S} s; its log is {log}"
    raise DemoError(message)


def two_gpus() -> bool:
    if os.environ.get("DEMO_DEVICE") == "cpu":
        return False
    from llm_allreduce_plugin.topology import NodeTopology

    return len(NodeTopology.detect().gpus) >= 2  # noqa: PLR2004


def server_setup(
    strategy: str, work: Path, model: Path, port: int, *, compiled: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the server: the YAML of configs/vllm with the strategy written into it."""
    import yaml

    gpus = two_gpus()
    template = ROOT / "configs" / "vllm" / ("demo_gpu.yaml" if gpus else "demo_cpu.yaml")
    settings = yaml.safe_load(template.read_text())
    settings["additional-config"]["allreduce"] |= {"allreduce_strategy": strategy, "report_dir": str(work / "report")}
    if compiled:
        settings.pop("enforce-eager", None)
    config = work / "serve.yaml"
    config.write_text(yaml.safe_dump(settings))
    say(f"{'two GPUs' if gpus else 'two CPU ranks'}; settings from configs/vllm/{template.name}, strategy {strategy}")

    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if not gpus:
        environment |= {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if compiled:
            environment |= {"CPU_OPS_COMPILE": "1", "VLLM_CACHE_ROOT": str(work / "cache")}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
    return command, environment


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


def check_fusion(strategy: str, log: str, *, compiled: bool) -> None:
    """Say what the log says about layer boundaries; in compiled graphs, all of them must have been fused."""
    lines = [line[line.index("all-reduce fusion: ") :] for line in log.splitlines() if "all-reduce fusion: " in line]
    for line in dict.fromkeys(lines):
        say(f"the log says: {line}")
    if compiled and strategy != "NCCL" and not any(f" {BOUNDARIES} layer boundaries fused" in line for line in lines):
        message = f"not all of the {BOUNDARIES} layer boundaries were fused"
        raise DemoError(message)


def run(strategy: str, work: Path, tokens_file: Path | None, *, compiled: bool) -> None:
    model = work / "model"
    say("writing a small Llama with seeded random weights")
    make_model(model)
    port = free_port()
    command, environment = server_setup(strategy, work, model, port, compiled=compiled)
    log = work / "server.log"
    say(f"vllm serve on port {port}; log: {log}")
    started = time.monotonic()
    with server(command, environment, log) as process:
        expected = reference_tokens(model)  # while it starts
        wait_for_health(process, f"http://127.0.0.1:{port}/health", log)
        say(f"healthy after {time.monotonic() - started:.0f} s")
        body = {"model": "demo", "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "return_token_ids": True}
        asked = time.monotonic()
        try:
            answer = http(f"http://127.0.0.1:{port}/v1/completions", body)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            message = f"the server answered {error.code}: {said}\nthe end of its log:\n{end_of(log)}"
            raise DemoError(message) from None
        seconds = time.monotonic() - asked
        time.sleep(1.5)  # the workers write their reports some times a second
        reports = read_reports(work / "report")
        counters = read_metrics(f"http://127.0.0.1:{port}/metrics")
    choice = answer["choices"][0]
    say(f"prompt: {PROMPT!r}")
    say(f"text:   {choice['text']!r}")
    say(f"tokens: {choice['token_ids']}")
    say(f"{answer['usage']['completion_tokens']} tokens in {seconds:.2f} s")
    check_reports(strategy, reports)
    print_reports(reports)
    for sample, value in counters.items():
        if "_total{" in sample:
            say(f"/metrics: {sample} {value:g}")
    check_fusion(strategy, log.read_text(errors="replace"), compiled=compiled or two_gpus())
    for line in log.read_text(errors="replace").splitlines():
        if "all-reduce summary: " in line:
            say(f"at the end, the log says: {line[line.index('all-reduce summary: ') :]}")
    if choice["token_ids"] != expected:
        message = f"Hugging Face generates other tokens from the same weights: {expected}"
        raise DemoError(message)
    say("Hugging Face generates the same tokens from the same weights")
    if tokens_file is not None:
        tokens_file.write_text(json.dumps(choice["token_ids"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategy", nargs="?", default="ONESHOT")
    parser.add_argument("--compile", action="store_true", help="compile the model on CPU ranks, too, as on GPUs")
    parser.add_argument("--tokens", type=Path, help="write the generated token ids to this file")
    parser.add_argument("--keep", action="store_true", help="keep model, log and reports")
    arguments = parser.parse_args()
    from llm_allreduce_plugin import AllReduceStrategy

    try:
        strategy = str(AllReduceStrategy.parse(arguments.strategy))
    except ValueError as error:
        say(f"{arguments.strategy!r}: {error}")
        return 2
    # Ctrl-C and a polite kill both unwind through the finally clauses above.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = Path(tempfile.mkdtemp(prefix="llm-allreduce-demo-"))
    try:
        run(strategy, work, arguments.tokens, compiled=arguments.compile)
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
