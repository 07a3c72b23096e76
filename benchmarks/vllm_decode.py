"""vLLM with its own all-reduce and with ours, side by side: milliseconds per token, and 256 requests token by token.

    python benchmarks/vllm_decode.py --tp 4 --width 8192 --out benchmarks/h200/vllm_tp4.json
    python benchmarks/vllm_decode.py --tp 4 --variants default ONESHOT TWOSHOT
    python benchmarks/vllm_decode.py --tp 2 --variants default MINLATENCY-unfused MINLATENCY
    python benchmarks/vllm_decode.py --tp 2 --hosts 2 --variants default ONESHOT TWOSHOT
    python benchmarks/vllm_decode.py --tp 2 --variants default default-flashinfer MINLATENCY --flashinfer FOLDER

A Llama of the given width with dummy weights, torch.compile and full CUDA graphs on. Every variant runs in a process
of its own, one after another. ms per token at a batch size: the median time between two of the engine's steps, over
200 steps in which the whole batch decodes. (The time of many tokens less that of one, taken before, carries the
jitter of two prefills.) GPU ms: the median time of the graphs of these steps, each on the rank on which it was the
shortest, for the others wait for that one. It is less than a step takes where the host is waited for. Where both run,
ONESHOT and TWOSHOT must generate the same tokens for the same 256 requests. ``--no-peer-access``: as on a node whose
GPUs do not see each other: NCCL with NCCL_P2P_DISABLE=1 against this package through host memory. Prefill: the median
time of 32 prompts of 1024 tokens with one new token each. A strategy with ``-unfused`` behind it: the norm behind
all-reduces stays vLLM's. ``--quantization fp8``: weights and activations, as vLLM quantizes a 16-bit model when it
loads it. ``--hosts 2``: the ranks as those of two hosts, as NCCL and this package tell hosts apart, with sockets on
the loopback device as the network between them; that shows that it works, and its times are of no network that a
cluster has. ``default-flashinfer``: vLLM with its own pass that gives all-reduce and norm to FlashInfer, by
FlashInfer's back end without multicast; only this variant finds FlashInfer, which lies in ``--flashinfer``, for with
it vLLM takes that pass, and multicast, unasked.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import decode, vllm_probe  # noqa: E402
from benchmarks.decode import BATCHES, NOT_COUNTED, PLUGIN, PROBE, STOCK  # noqa: E402

STEPS = 200
PREFILLS = 3
BETWEEN_HOSTS = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}  # the network between hosts of one machine
PROFILED_BATCH = 32
PROFILED_TOKENS = 16
FLASHINFER = "default-flashinfer"
FLASHINFER_READY = "Initialized FlashInfer Allreduce norm fusion workspace with backend=trtllm"
VLLM_ALONE = (STOCK, FLASHINFER)


def engine_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What differs between variants."""
    extra: dict[str, Any] = {"compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 128, 256]}}
    if arguments.quantization:
        extra["quantization"] = arguments.quantization
    if arguments.no_peer_access:
        extra["disable_custom_all_reduce"] = True
    if arguments.variant == FLASHINFER:
        extra["compilation_config"]["pass_config"] = {"fuse_allreduce_rms": True}
    if arguments.variant not in VLLM_ALONE:
        settings = decode.settings_of(arguments.variant, arguments.report)
        settings |= {"transport": "host"} if arguments.no_peer_access else {}
        extra["additional_config"] = {"allreduce": settings}
    if arguments.profile is not None:
        extra["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": str(arguments.profile / arguments.variant),
            "torch_profiler_with_stack": False,
        }
    return extra


def run_variant(arguments: argparse.Namespace) -> None:
    """One engine: write times and tokens to ``--result``."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    started = time.monotonic()
    llm = LLM(
        model=arguments.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        tensor_parallel_size=arguments.tp[0],
        max_model_len=2048,
        gpu_memory_utilization=0.6,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **engine_arguments(arguments),
    )
    result: dict[str, Any] = {"start_s": round(time.monotonic() - started, 1)}
    generator = random.Random(7)

    def prompts(count: int, shortest: int, longest: int) -> list[dict[str, list[int]]]:
        return [{"prompt_token_ids": tokens} for tokens in decode.prompts(generator, count, shortest, longest)]

    def generate(batch: list[Any], new_tokens: int) -> tuple[float, list[list[int]]]:
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        outputs = llm.generate(batch, sampling, use_tqdm=False)
        return time.perf_counter() - begin, [list(output.outputs[0].token_ids) for output in outputs]

    def step_times(batch: list[Any]) -> list[float]:
        """Seconds between the steps in which all of the batch decode."""
        sampling = SamplingParams(
            temperature=0,
            max_tokens=STEPS + 2 * NOT_COUNTED,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine = llm.llm_engine
        for number, prompt in enumerate(batch):
            engine.add_request(f"{len(batch)}-{number}", prompt, sampling)
        stamps = []
        with decode.alone(arguments.quiet):
            while engine.has_unfinished_requests():
                if len(engine.step()) == len(batch):
                    stamps.append(time.perf_counter())
        return [later - earlier for earlier, later in itertools.pairwise(stamps)][NOT_COUNTED:-NOT_COUNTED]

    for size in BATCHES:
        batch = prompts(size, 32, 32)
        generate(batch, 4)
        llm.collective_rpc(vllm_probe.GRAPH_MS)
        steps = step_times(batch)
        result[f"ms_per_token_batch_{size}"] = decode.milliseconds(steps)
        result[f"steps_batch_{size}"] = len(steps)
        result[f"gpu_ms_batch_{size}"] = decode.graph_milliseconds(llm.collective_rpc(vllm_probe.GRAPH_MS), STEPS)
    if arguments.profile is not None:
        llm.start_profile()
        generate(prompts(PROFILED_BATCH, 32, 32), PROFILED_TOKENS)
        llm.stop_profile()
    prefills = []
    with decode.alone(arguments.quiet):
        for _ in range(PREFILLS + 1):  # the first one is not counted
            prefills.append(generate(prompts(32, 1024, 1024), 1)[0])
    result["prefill_32x1024_s"] = round(statistics.median(prefills[1:]), 3)
    result["tokens"] = []
    if arguments.requests:
        seconds, result["tokens"] = generate(prompts(arguments.requests, 16, 96), 48)
        result["requests_s"] = round(seconds, 2)
    time.sleep(1.5)  # the workers' reports are written about once a second
    Path(arguments.result).write_text(json.dumps(result))


def start_variant(
    variant: str, tp: int, arguments: argparse.Namespace, model: Path, work: Path, log: Path
) -> dict[str, Any]:
    report = work / f"report-{variant}-{tp}"
    result = work / f"result-{variant}-{tp}.json"
    environment = dict(os.environ)
    environment |= {
        "VLLM_PLUGINS": PROBE if variant in VLLM_ALONE else f"{PROBE},{PLUGIN}",  # alone: as if ours were not there
        "PYTHONPATH": decode.python_path(work / "probe"),
    }
    if variant == FLASHINFER:
        folder = arguments.flashinfer.resolve()
        environment |= {
            "PYTHONPATH": os.pathsep.join([environment["PYTHONPATH"], str(folder)]),
            "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",
        }
    if arguments.hosts > 1:
        environment |= {
            **BETWEEN_HOSTS,
            vllm_probe.RANKS_OF_A_HOST: str(tp // arguments.hosts),
        }
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--variant",
        variant,
        "--tp",
        str(tp),
        "--model",
        str(model),
        "--requests",
        str(arguments.requests),
    ]
    if arguments.quantization:
        command += ["--quantization", arguments.quantization]
    if arguments.no_peer_access:
        command.append("--no-peer-access")
        environment |= {"NCCL_P2P_DISABLE": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
    if arguments.profile is not None:
        command += ["--profile", str(arguments.profile)]
    if arguments.quiet is not None:
        command += ["--quiet", arguments.quiet]
    command += ["--result", str(result), "--report", str(report)]
    answer = decode.run_process(f"{variant} at TP{tp}", command, environment, log, result, 400)
    said = log.read_text(errors="replace")
    answer["log"] = decode.said_in(said)
    if variant == FLASHINFER and FLASHINFER_READY not in said:
        message = f"{variant} at TP{tp}: the log, {log}, does not say: {FLASHINFER_READY}"
        raise RuntimeError(message)
    answer["reports"] = decode.reports_in(report)
    if (
        arguments.hosts > 1
        and variant not in VLLM_ALONE
        and not any(f"each of {arguments.hosts} hosts" in line for line in answer["log"])
    ):
        message = (
            f"{variant} at TP{tp}: the log does not say that ranks are on {arguments.hosts} hosts: {answer['log']}"
        )
        raise RuntimeError(message)
    return answer


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="+", default=[2])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--variants", nargs="+", default=["default", "MINLATENCY"])
    parser.add_argument("--requests", type=int, default=256, help="whose tokens are compared; 0: none")
    parser.add_argument("--no-peer-access", action="store_true", help="everything through host memory")
    parser.add_argument("--quantization", choices=["fp8"], help="vLLM's; default: none")
    parser.add_argument("--profile", type=Path, help=f"folder for traces of GPUs at batch {PROFILED_BATCH}")
    parser.add_argument("--flashinfer", type=Path, metavar="FOLDER", help=f"where {FLASHINFER} finds it, installed")
    parser.add_argument("--hosts", type=int, default=1, help="ranks are those of so many hosts (NCCL_HOSTID)")
    parser.add_argument("--quiet", metavar="FILE", help="times are taken while this file is locked: others wait")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    for internal in ("--variant", "--model", "--result", "--report"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if FLASHINFER in arguments.variants and arguments.flashinfer is None:
        parser.error(f"{FLASHINFER} needs --flashinfer FOLDER")
    if FLASHINFER in arguments.variants and arguments.hosts > 1:
        parser.error(f"{FLASHINFER} is for one host")
    return arguments


def main() -> None:
    arguments = parsed()
    if arguments.variant:
        run_variant(arguments)
        return

    from llm_allreduce_plugin.measure.environment import write_record

    decode.exit_on_sigterm()
    rows: list[dict[str, Any]] = []
    failed = False

    def record() -> None:
        if arguments.out:
            write_record(
                arguments.out,
                rows,
                harness=__doc__,
                width=arguments.width,
                layers=arguments.layers,
                quantization=arguments.quantization,
                peer_access=not arguments.no_peer_access,
                hosts=arguments.hosts,
            )

    with tempfile.TemporaryDirectory(prefix="vllm-bench-") as folder:
        work = Path(folder)
        decode.write_model(work / "model", arguments.width, arguments.layers)
        (work / "probe").mkdir()
        decode.install_probe(work / "probe", ROOT / "benchmarks" / "vllm_probe.py", "vllm.general_plugins")
        for tp in arguments.tp:
            tokens = {}
            for variant in arguments.variants:
                log = arguments.logs / f"vllm-{variant}-tp{tp}.log"
                answer = start_variant(variant, tp, arguments, work / "model", work, log)
                tokens[variant] = answer.pop("tokens")
                row = {"tp": tp, "variant": variant, **answer}
                rows.append(row)
                times = decode.times_of(row)
                print(
                    f"TP{tp} {variant:>8}: ms per token at batch {BATCHES}: {times}; on the GPU "
                    f"{decode.times_of(row, 'gpu_ms')}; prefill "
                    f"{row['prefill_32x1024_s']} s; start {row['start_s']} s",
                    flush=True,
                )
                record()
            if arguments.requests:
                first, *rest = arguments.variants
                same = {name: decode.equal_requests(tokens[first], tokens[name]) for name in rest}
                rows.append({"tp": tp, "requests": arguments.requests, f"same_tokens_as_{first}": same})
                print(f"TP{tp}: requests with the tokens of {first}, of {arguments.requests}: {same}", flush=True)
            if "ONESHOT" in tokens and "TWOSHOT" in tokens:
                equal = decode.equal_requests(tokens["ONESHOT"], tokens["TWOSHOT"])
                rows.append({"tp": tp, "requests": arguments.requests, "same_tokens_oneshot_twoshot": equal})
                print(
                    f"TP{tp}: {equal} of {arguments.requests} requests have the same tokens with ONESHOT and TWOSHOT",
                    flush=True,
                )
                failed |= equal != arguments.requests
            record()
    sys.exit(failed)


if __name__ == "__main__":
    main()
