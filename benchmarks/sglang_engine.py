"""One engine of ``sglang_decode.py``, in a process of its own: milliseconds per token, and tokens, to ``--result``."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import decode, sglang_probe, turns  # noqa: E402
from benchmarks.decode import BATCHES, NOT_COUNTED, STOCK  # noqa: E402

# Steps for a batch, of which some are not counted. On CPU ranks a step is slow, and its time is of no interest.
STEPS = {"cuda": 120, "cpu": 24}
PASSES = {"cuda": 7, "cpu": 1}
PROMPT_TOKENS = 16
NEW_TOKENS = 48
PROFILED_TOKENS = 16
TOKENS = 65536  # of several engines on the same GPUs, each; by itself each would take half of the memory it finds


def read_stamps(path: Path) -> list[tuple[float, int]]:
    """``(seconds, batch size)`` of each step of decode."""
    lines = path.read_text().splitlines()
    return [(float(time_), int(size)) for time_, size in map(str.split, lines)]


def step_times(stamps: Iterable[tuple[float, int]], size: int, begin: float, end: float) -> list[float]:
    """Seconds between the steps of a batch of ``size`` from ``begin`` to ``end``, but for some at either end.

    Raises:
        RuntimeError: there are no more steps than those that are not counted.
    """
    found = [stamp for stamp in stamps if begin <= stamp[0] <= end]
    times = [
        later - earlier for (earlier, before), (later, after) in itertools.pairwise(found) if before == after == size
    ]
    if len(times) <= 2 * NOT_COUNTED:
        message = f"batch {size}: {len(times)} steps of decode were stamped, more than {2 * NOT_COUNTED} are needed"
        raise RuntimeError(message)
    return times[NOT_COUNTED:-NOT_COUNTED]


def engine_arguments(device: str, *, several: bool = False) -> dict[str, Any]:
    """Kernels that need no further packages, and graphs of the batch sizes that are measured."""
    if device == "cpu":
        return {"device": "cpu", "attention_backend": "torch_native", "max_total_tokens": 32768}
    room = {"max_total_tokens": TOKENS} if several else {}
    return room | {
        "disable_prefill_cuda_graph": True,  # decode alone is measured; capturing these is most of a start
        "attention_backend": "triton",
        "mm_feature_transport": "cpu",
        "mem_fraction_static": 0.5,
        "cuda_graph_max_bs_decode": max(BATCHES),
        "cuda_graph_bs_decode": list(BATCHES),
    }


def run_variant(arguments: argparse.Namespace) -> None:
    """Run the engine, pass by pass, and write what it has measured."""
    import sglang

    from llm_allreduce_plugin import LlmArgs

    started = time.monotonic()
    extra = engine_arguments(arguments.device, several=arguments.turns is not None)
    if arguments.variant != STOCK:
        extra |= LlmArgs(allreduce=decode.settings_of(arguments.variant, arguments.report)).sglang_kwargs()
    engine = sglang.Engine(
        model_path=arguments.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        tp_size=arguments.tp,
        context_length=2048,
        max_running_requests=max(BATCHES),
        disable_radix_cache=True,
        sampling_backend="pytorch",
        grammar_backend="none",
        enforce_disable_flashinfer_allreduce_fusion=True,
        random_seed=7,
        log_level="info",
        **extra,
    )
    result: dict[str, Any] = {"version": sglang.__version__, "start_s": round(time.monotonic() - started, 1)}
    generator = random.Random(7)
    batches = itertools.count()

    def generate(batch: list[list[int]], new_tokens: int) -> tuple[float, float, list[list[int]]]:
        number = next(batches)
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        names = [f"{len(batch)}-{number}-{index}" for index in range(len(batch))]
        begin = time.perf_counter()
        outputs = engine.generate(input_ids=batch, sampling_params=sampling, rid=names)
        return begin, time.perf_counter(), [list(output["output_ids"]) for output in outputs]

    spans: dict[int, list[tuple[float, float]]] = {size: [] for size in BATCHES}
    mine = turns.turns_of(arguments)
    passes = arguments.passes or PASSES[arguments.device]
    for _ in range(passes):
        with turns.next_of(mine):
            for size in BATCHES:
                batch = decode.prompts(generator, size, PROMPT_TOKENS, PROMPT_TOKENS)
                generate(batch, 4)
                with decode.alone(arguments.quiet):
                    begin, end, _ = generate(batch, STEPS[arguments.device])
                spans[size].append((begin, end))
    if mine is not None:
        mine.all_over(passes)
    if arguments.profile is not None:
        engine.start_profile(
            output_dir=str(arguments.profile), activities=["GPU"], profile_prefix=arguments.variant, with_stack=False
        )
        generate(decode.prompts(generator, max(BATCHES), PROMPT_TOKENS, PROMPT_TOKENS), PROFILED_TOKENS)
        engine.stop_profile()
    result["tokens"] = []
    if arguments.requests:
        begin, end, result["tokens"] = generate(decode.prompts(generator, arguments.requests, 16, 96), NEW_TOKENS)
        result["requests_s"] = round(end - begin, 2)
    stamps = read_stamps(Path(os.environ[sglang_probe.FOLDER]) / sglang_probe.STEPS)
    for size, passes in spans.items():
        steps = [step_times(stamps, size, begin, end) for begin, end in passes]
        result |= decode.of_passes(size, steps)
    time.sleep(1.5)  # the ranks' reports are written about once a second
    Path(arguments.result).write_text(json.dumps(result))
    engine.shutdown()


def parsed() -> argparse.Namespace:
    parser = decode.engine_parser(__doc__)
    parser.add_argument("--device", choices=list(STEPS), required=True)
    return parser.parse_args()


if __name__ == "__main__":
    run_variant(parsed())
