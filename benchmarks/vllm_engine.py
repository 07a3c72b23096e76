"""One engine of ``vllm_decode.py``, in a process of its own: milliseconds per token, and tokens, to ``--result``."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import clocks, decode, turns, vllm_probe  # noqa: E402
from benchmarks.decode import BATCHES, NOT_COUNTED, STOCK  # noqa: E402

STEPS = 200
PREFILLS = 3
PROFILED_BATCH = 32
PROFILED_TOKENS = 16
FLASHINFER = "default-flashinfer"
VLLM_ALONE = (STOCK, FLASHINFER)
MEMORY = 0.6  # of each GPU
# Of several engines on the same GPUs, each: vLLM measures no memory then, which others take and give back meanwhile.
KEYS_AND_VALUES_BYTES = 2 << 30
LEAST_MEMORY = 0.05  # that must be free


def engine_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What differs between variants, and between one engine and several."""
    extra: dict[str, Any] = {"compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 128, 256]}}
    if arguments.turns is None:
        extra["gpu_memory_utilization"] = MEMORY
    else:
        extra |= {"gpu_memory_utilization": LEAST_MEMORY, "kv_cache_memory_bytes": KEYS_AND_VALUES_BYTES}
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
            "torch_profiler_dir": str(arguments.profile),
            "torch_profiler_with_stack": False,
        }
    return extra


def start(arguments: argparse.Namespace) -> Any:  # noqa: ANN401
    """The engine, as vLLM's ``LLM``."""
    from vllm import LLM

    return LLM(
        model=arguments.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        tensor_parallel_size=arguments.tp,
        max_model_len=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **engine_arguments(arguments),
    )


def step_times(llm: Any, batch: list[Any], quiet: str | None) -> list[float]:  # noqa: ANN401
    """Seconds between the steps in which all of the batch decode."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

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
    with decode.alone(quiet):
        while engine.has_unfinished_requests():
            if len(engine.step()) == len(batch):
                stamps.append(time.perf_counter())
    return [later - earlier for earlier, later in itertools.pairwise(stamps)][NOT_COUNTED:-NOT_COUNTED]


def summary(steps: dict[int, list[list[float]]], graphs: dict[int, list[float | None]]) -> dict[str, Any]:
    """What a record has of the passes: for each batch size the seconds of steps, and milliseconds of graphs."""
    result: dict[str, Any] = {}
    for size in BATCHES:
        result |= decode.of_passes(size, steps[size])
        known = [time_ for time_ in graphs[size] if time_ is not None]
        result[f"gpu_ms_batch_{size}"] = round(statistics.median(known), 3) if known else None
        result[f"gpu_passes_batch_{size}"] = graphs[size]
    return result


def run_variant(arguments: argparse.Namespace) -> None:
    """Run the engine, pass by pass, and write what it has measured."""
    from vllm import SamplingParams

    started = time.monotonic()
    llm = start(arguments)
    result: dict[str, Any] = {"start_s": round(time.monotonic() - started, 1)}
    generator = random.Random(7)
    mine = turns.turns_of(arguments)

    def prompts(count: int, shortest: int, longest: int) -> list[dict[str, list[int]]]:
        return [{"prompt_token_ids": tokens} for tokens in decode.prompts(generator, count, shortest, longest)]

    def generate(batch: list[Any], new_tokens: int) -> tuple[float, list[list[int]]]:
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        outputs = llm.generate(batch, sampling, use_tqdm=False)
        return time.perf_counter() - begin, [list(output.outputs[0].token_ids) for output in outputs]

    steps: dict[int, list[list[float]]] = {size: [] for size in BATCHES}
    graphs: dict[int, list[float | None]] = {size: [] for size in BATCHES}
    seen: dict[int, list[dict[str, Any]]] = {size: [] for size in BATCHES}
    prefills: list[float] = []
    for _ in range(arguments.passes):
        with turns.next_of(mine):
            for size in BATCHES:
                batch = prompts(size, 32, 32)
                generate(batch, 4)
                llm.collective_rpc(vllm_probe.GRAPH_MS)
                watched = clocks.sampled(clocks.visible_gpus(arguments.tp)) if arguments.clocks else None
                with watched or contextlib.nullcontext() as samples:
                    steps[size].append(step_times(llm, batch, arguments.quiet))
                if samples is not None:
                    seen[size].append(samples.summary())
                graphs[size].append(decode.graph_milliseconds(llm.collective_rpc(vllm_probe.GRAPH_MS), STEPS))
            with decode.alone(arguments.quiet):
                taken = [generate(prompts(32, 1024, 1024), 1)[0] for _ in range(PREFILLS + 1)]
            prefills += taken[1:]  # the first one is not counted
    if arguments.profile is not None:
        with turns.next_of(mine):
            llm.start_profile()
            generate(prompts(arguments.profiled_batch, 32, 32), PROFILED_TOKENS)
            llm.stop_profile()
    if mine is not None:
        mine.all_over(arguments.passes + (arguments.profile is not None))
    result |= summary(steps, graphs)
    if arguments.clocks:
        result |= {f"clocks_batch_{size}": seen[size] for size in BATCHES}
    result["prefill_32x1024_s"] = round(statistics.median(prefills), 3)
    result["tokens"] = []
    if arguments.requests:
        seconds, result["tokens"] = generate(prompts(arguments.requests, 16, 96), 48)
        result["requests_s"] = round(seconds, 2)
    time.sleep(1.5)  # the workers' reports are written about once a second
    Path(arguments.result).write_text(json.dumps(result))


def parsed() -> argparse.Namespace:
    parser = decode.engine_parser(__doc__)
    parser.add_argument("--profiled-batch", type=int, required=True)
    parser.add_argument("--no-peer-access", action="store_true")
    parser.add_argument("--quantization")
    parser.add_argument("--clocks", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    run_variant(parsed())
