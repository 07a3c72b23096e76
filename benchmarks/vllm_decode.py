"""vLLM with its own all-reduce and with ours, side by side: milliseconds per token, and 256 requests token by token.

    python benchmarks/vllm_decode.py --tp 4 --width 8192 --out benchmarks/h200/vllm_tp4.json
    python benchmarks/vllm_decode.py --tp 4 --variants default ONESHOT TWOSHOT
    python benchmarks/vllm_decode.py --tp 2 --variants default MINLATENCY-unfused MINLATENCY
    python benchmarks/vllm_decode.py --tp 4 --requests 0 --together --passes 5
    python benchmarks/vllm_decode.py --tp 2 --hosts 2 --variants default ONESHOT TWOSHOT
    python benchmarks/vllm_decode.py --tp 2 --variants default default-flashinfer MINLATENCY --flashinfer FOLDER

A Llama of the given width with dummy weights, torch.compile and full CUDA graphs on. Every variant runs in a process of
its own (``vllm_engine.py``), one after another, ``--starts`` times. ms per token at a batch size: the median time
between two of the engine's steps, over 200 steps of each pass in which the whole batch decodes. (The time of many
tokens less that of one, taken before, carries the jitter of two prefills.) GPU ms: the median time of the graphs of
these steps, each on the rank on which it was the shortest, for the others wait for that one. It is less than a step
takes where the host is waited for. Where both run, ONESHOT and TWOSHOT must generate the same tokens for the same 256
requests. ``--together``: the engines of one start, a variant each, are all there at once, idle but for the one whose
turn it is, pass by pass: what slows a machine down for minutes then slows all of them alike, and a row has the median
of the ratios of passes that stood side by side. A variant may be named twice. ``--no-peer-access``: as on a node whose
GPUs do not see each other: NCCL with NCCL_P2P_DISABLE=1 against this package through host memory. Prefill: the median
time of 32 prompts of 1024 tokens with one new token each. A strategy with ``-unfused`` behind it: the norm behind
all-reduces stays vLLM's. ``--quantization fp8``: weights and activations, as vLLM quantizes a 16-bit model when it
loads it. ``--clocks``: for each pass, what the GPUs' clock was, and whether their power limit lowered it. ``--hosts
2``: the ranks as those of two hosts, as NCCL and this package tell hosts apart, with sockets on the loopback device as
the network between them; that shows that it works, and its times are of no network that a cluster has.
``default-flashinfer``: vLLM with its own pass that gives all-reduce and norm to FlashInfer, by FlashInfer's back end
without multicast; only this variant finds FlashInfer, which lies in ``--flashinfer``, for with it vLLM takes that pass,
and multicast, unasked.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import decode, turns, vllm_engine, vllm_probe  # noqa: E402
from benchmarks.decode import BATCHES, PLUGIN, PROBE, STOCK  # noqa: E402
from benchmarks.starts import Answer, start_all  # noqa: E402
from benchmarks.vllm_engine import FLASHINFER, VLLM_ALONE  # noqa: E402

START_AND_RUN_S = 400
BETWEEN_HOSTS = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}  # the network between hosts of one machine
FLASHINFER_READY = "Initialized FlashInfer Allreduce norm fusion workspace with backend=trtllm"


def start_variant(
    variant: str, name: str, tp: int, arguments: argparse.Namespace, work: Path, options: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Run one start of a variant; what it measured, what its log said of ours, and the ranks' reports.

    ``name``: of this start, in file names. ``options``: of its turns, where several engines are there at once.
    """
    log = arguments.logs / f"vllm-{name}.log"
    report, result = work / f"report-{name}", work / f"result-{name}.json"
    environment = dict(os.environ)
    environment |= {
        "VLLM_PLUGINS": PROBE if variant in VLLM_ALONE else f"{PROBE},{PLUGIN}",  # alone: as if ours were not there
        "PYTHONPATH": decode.python_path(work / "probe"),
    }
    if options:  # two engines of one variant would write the same compiled graphs at once
        environment["VLLM_CACHE_ROOT"] = str(work / f"cache-{name}")
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
    command = [sys.executable, str(Path(vllm_engine.__file__).resolve()), "--variant", variant, "--tp", str(tp)]
    command += ["--model", str(work / "model"), "--requests", str(arguments.requests)]
    command += ["--passes", str(arguments.passes), "--profiled-batch", str(arguments.profiled_batch), *options]
    if arguments.quantization:
        command += ["--quantization", arguments.quantization]
    if arguments.no_peer_access:
        command.append("--no-peer-access")
        environment |= {"NCCL_P2P_DISABLE": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
    if arguments.clocks:
        command.append("--clocks")
    if arguments.profile is not None:
        command += ["--profile", str(arguments.profile / name)]
    if arguments.quiet is not None:
        command += ["--quiet", arguments.quiet]
    command += ["--result", str(result), "--report", str(report)]
    answer = decode.run_process(name, command, environment, log, result, START_AND_RUN_S)
    said = log.read_text(errors="replace")
    answer["log"] = decode.said_in(said)
    if variant == FLASHINFER and FLASHINFER_READY not in said:
        message = f"{name}: the log, {log}, does not say: {FLASHINFER_READY}"
        raise RuntimeError(message)
    answer["reports"] = decode.reports_in(report)
    if (
        arguments.hosts > 1
        and variant not in VLLM_ALONE
        and not any(f"each of {arguments.hosts} hosts" in line for line in answer["log"])
    ):
        message = f"{name}: the log does not say that ranks are on {arguments.hosts} hosts: {answer['log']}"
        raise RuntimeError(message)
    return answer


def all_starts(arguments: argparse.Namespace, tp: int, work: Path) -> Iterator[tuple[int, tuple[str, Answer]]]:
    """Every start of every variant, as they end."""
    for start in range(arguments.starts):
        numbers = itertools.count()

        def run(variant: str, options: tuple[str, ...], start: int = start, numbers: Any = numbers) -> dict[str, Any]:  # noqa: ANN401
            name = f"{variant}-tp{tp}-{start}-{next(numbers)}"
            return start_variant(variant, name, tp, arguments, work, options)

        together = work / f"turns-{tp}-{start}" if arguments.together else None
        for found in start_all(arguments.variants, together, run):
            yield start, found


def compare(tokens: dict[str, list[list[int]]], tp: int, requests: int) -> tuple[list[dict[str, Any]], bool]:
    """Rows that say how many requests have the same tokens, and whether all that must be equal are.

    ``tokens``: of each variant, of its first start, the tokens of each request.
    """
    rows: list[dict[str, Any]] = []
    equal = requests
    first, *rest = tokens
    same = {name: decode.equal_requests(tokens[first], tokens[name]) for name in rest}
    rows.append({"tp": tp, "requests": requests, f"same_tokens_as_{first}": same})
    if "ONESHOT" in tokens and "TWOSHOT" in tokens:
        equal = decode.equal_requests(tokens["ONESHOT"], tokens["TWOSHOT"])
        rows.append({"tp": tp, "requests": requests, "same_tokens_oneshot_twoshot": equal})
    return rows, equal == requests


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="+", default=[2])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--variants", nargs="+", default=["default", "MINLATENCY"])
    parser.add_argument("--requests", type=int, default=256, help="whose tokens are compared; 0: none")
    parser.add_argument("--no-peer-access", action="store_true", help="everything through host memory")
    parser.add_argument("--quantization", choices=["fp8"], help="vLLM's; default: none")
    parser.add_argument("--starts", type=int, default=1, help="of each variant, in turns")
    parser.add_argument("--together", action="store_true", help="engines of one start at once, passes in turns")
    parser.add_argument("--passes", type=int, default=1, help="over all batch sizes")
    parser.add_argument("--clocks", action="store_true", help="record clock and power of the GPUs of each pass")
    parser.add_argument("--profile", type=Path, help="folder for traces of GPUs (kernel_times.py)")
    parser.add_argument("--profiled-batch", type=int, default=vllm_engine.PROFILED_BATCH)
    parser.add_argument("--flashinfer", type=Path, metavar="FOLDER", help=f"where {FLASHINFER} finds it, installed")
    parser.add_argument("--hosts", type=int, default=1, help="ranks are those of so many hosts (NCCL_HOSTID)")
    parser.add_argument("--quiet", metavar="FILE", help="times are taken while this file is locked: others wait")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    if FLASHINFER in arguments.variants and arguments.flashinfer is None:
        parser.error(f"{FLASHINFER} needs --flashinfer FOLDER")
    if FLASHINFER in arguments.variants and arguments.hosts > 1:
        parser.error(f"{FLASHINFER} is for one host")
    return arguments


def main() -> None:
    arguments = parsed()

    from llm_allreduce_plugin.measure.environment import write_record

    decode.exit_on_sigterm()
    rows: list[dict[str, Any]] = []
    good = True

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
            tokens: dict[str, list[list[int]]] = {}
            of_tp: list[dict[str, Any]] = []
            for start, (variant, answer) in all_starts(arguments, tp, work):
                if isinstance(answer, Exception):
                    print(f"TP{tp} {variant:>8}: {answer}", flush=True)
                    good = False
                    continue  # the others are worth their time
                tokens.setdefault(variant, answer.pop("tokens"))
                row = {"tp": tp, "variant": variant, "start": start, **answer}
                rows.append(row)
                of_tp.append(row)
                times = decode.times_of(row)
                print(
                    f"TP{tp} {variant:>8}: ms per token at batch {BATCHES}: {times}; on the GPU "
                    f"{decode.times_of(row, 'gpu_ms')}; prefill "
                    f"{row['prefill_32x1024_s']} s; start {row['start_s']} s",
                    flush=True,
                )
                record()
            if arguments.together:
                beside = turns.ratios(of_tp, BATCHES, STOCK)
                on_gpu = turns.ratios(of_tp, BATCHES, STOCK, "gpu_passes")
                rows.append({"tp": tp, "ratios_to_default": beside, "gpu_ratios_to_default": on_gpu})
                print(f"TP{tp}: over default, pass by pass: {beside}; on the GPU: {on_gpu}", flush=True)
            if arguments.requests and tokens:
                found, equal = compare(tokens, tp, arguments.requests)
                good &= equal
                rows += found
                print("\n".join(f"TP{tp}: {row}" for row in found), flush=True)
            record()
    sys.exit(not good)


if __name__ == "__main__":
    main()
