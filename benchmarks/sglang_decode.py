"""SGLang with its own all-reduce and with ours, side by side: milliseconds per token, and 256 requests token by token.

    python benchmarks/sglang_decode.py --tp 2 --out benchmarks/h100/sglang_4096_tp2.json
    python benchmarks/sglang_decode.py --tp 2 --width 8192 --requests 0 --variants default AUTO-unfused AUTO
    python benchmarks/sglang_decode.py --tp 2 --requests 0 --together
    python benchmarks/sglang_decode.py --tp 2 --starts 1 --variants default ONESHOT TWOSHOT
    python benchmarks/sglang_decode.py --device cpu --width 256 --layers 2 --requests 16 --variants default ONESHOT

A Llama of the given width with SGLang's dummy weights, which are the same in every start; decode in full CUDA graphs.
Every variant runs in a process of its own (``sglang_engine.py``), each ``--starts`` times in turns: A B C A B C. ms per
token at a batch size: the median time between two steps of rank 0's scheduler (``sglang_probe.py``), over the steps in
which the whole batch decodes, in several passes over all sizes: one takes a second, in which a machine may be busy with
something else.
With ``--requests``, ONESHOT and TWOSHOT must generate the same tokens, and so must every start of one variant; how many
requests are equal to SGLang's own is recorded, too. ``default``: SGLang without this package. ``--together``: the
engines of one start, a variant each, are all there at once, idle but for the one whose turn it is: pass by pass, A B C
A B C. What slows a machine down for minutes then slows all variants alike, and a row has the median of the ratios of
passes that stood side by side.
FlashInfer's fusion, which may use NVLink multicast, is off in all variants, and so is all that needs more of SGLang's
CUDA packages than a dense model does. A strategy with ``-unfused`` behind it: the norm behind all-reduces stays
SGLang's.
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

from benchmarks import decode, sglang_engine, sglang_probe, turns  # noqa: E402
from benchmarks.decode import BATCHES, PLUGIN, PROBE, STOCK  # noqa: E402
from benchmarks.starts import Answer, start_all  # noqa: E402

# A first start compiles kernels, which takes a minute and a half.
START_AND_RUN_S = 400
CPU = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


def start_variant(
    variant: str, start: int, arguments: argparse.Namespace, work: Path, options: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Run one start of a variant; what it measured, what its log said of ours, and the ranks' reports.

    ``options``: of its turns, where several engines are there at once.
    """
    log = arguments.logs / f"sglang-{arguments.width}-{variant}-tp{arguments.tp[0]}-{start}.log"
    name = f"{variant}-tp{arguments.tp[0]}-{start}"
    folder = work / name
    (folder / "stamps").mkdir(parents=True)
    report, result = folder / "report", folder / "result.json"
    environment = dict(os.environ) | (CPU if arguments.device == "cpu" else {})
    environment |= {
        # Who is named is loaded, and nothing else: without ours, SGLang is as if this package were not there.
        "SGLANG_PLUGINS": PROBE if variant == STOCK else f"{PROBE},{PLUGIN}",
        sglang_probe.FOLDER: str(folder / "stamps"),
        "PYTHONPATH": decode.python_path(work / "probe"),
    }
    if arguments.device == "cpu":
        environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(map(str, range(arguments.tp[0]))))
    command = [sys.executable, str(Path(sglang_engine.__file__)), "--variant", variant, "--tp", str(arguments.tp[0])]
    command += ["--model", str(work / "model"), "--requests", str(arguments.requests), "--device", arguments.device]
    command += ["--result", str(result), "--report", str(report), *options]
    if options:
        # Others open theirs meanwhile, on one GPU sooner than on the other.
        environment["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "false"
    if arguments.passes is not None:
        command += ["--passes", str(arguments.passes)]
    if arguments.profile is not None:
        command += ["--profile", str(arguments.profile)]
    if arguments.quiet is not None:
        command += ["--quiet", arguments.quiet]
    answer = decode.run_process(name, command, environment, log, result, START_AND_RUN_S)
    answer["log"] = decode.said_in(log.read_text(errors="replace"))
    answer["reports"] = decode.reports_in(report)
    check_variant(variant, arguments.tp[0], answer)
    return answer


def all_starts(arguments: argparse.Namespace, work: Path) -> Iterator[tuple[int, tuple[str, Answer]]]:
    """Every start of every variant, as they end."""
    for start in range(arguments.starts):

        def run(variant: str, options: tuple[str, ...], start: int = start) -> dict[str, Any]:
            return start_variant(variant, start, arguments, work, options)

        together = work / f"turns-{start}" if arguments.together else None
        for found in start_all(arguments.variants, together, run):
            yield start, found


def check_variant(variant: str, tp: int, answer: dict[str, Any]) -> None:
    """That what was measured is what the variant says.

    Raises:
        RuntimeError: ours ran where it should not, or did not where it should, or layer boundaries were or were not
            fused against the variant's name.
    """
    calls = [report["calls"] for report in answer["reports"]]
    fault = None
    if variant == STOCK:
        if calls or any(line.startswith("all-reduce over ") for line in answer["log"]):
            fault = "this package ran in SGLang's own variant"
    elif len(calls) != tp or not all(calls):
        fault = f"{len(calls)} of {tp} ranks report calls"
    else:
        fused = any(name.endswith(("then norm", "(fused norm)")) for rank in calls for name in rank)
        if fused == variant.endswith(decode.UNFUSED):
            fault = f"layer boundaries were {'' if fused else 'not '}fused"
    if fault is not None:
        message = f"{variant} at TP{tp}: {fault}; the log says: {answer['log']}"
        raise RuntimeError(message)


def compare(tokens: dict[str, list[list[list[int]]]], tp: int, requests: int) -> tuple[dict[str, Any], bool]:
    """A row that says how many requests have the same tokens, and whether all that must be equal are.

    ``tokens``: of each variant, for each start, the tokens of each request.
    """
    row: dict[str, Any] = {"tp": tp, "requests": requests}
    row["same_tokens_in_every_start"] = {
        variant: min(decode.equal_requests(starts[0], again) for again in starts) for variant, starts in tokens.items()
    }
    row["different_tokens"] = {
        variant: len(set(itertools.chain.from_iterable(starts[0]))) for variant, starts in tokens.items()
    }
    equal = all(same == requests for same in row["same_tokens_in_every_start"].values())
    if "ONESHOT" in tokens and "TWOSHOT" in tokens:
        row["same_tokens_oneshot_twoshot"] = decode.equal_requests(tokens["ONESHOT"][0], tokens["TWOSHOT"][0])
        equal &= row["same_tokens_oneshot_twoshot"] == requests
    if STOCK in tokens:
        row["same_tokens_as_default"] = {
            variant: decode.equal_requests(tokens[STOCK][0], starts[0])
            for variant, starts in tokens.items()
            if variant != STOCK
        }
    return row, equal


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs=1, default=[2])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--variants", nargs="+", default=[STOCK, "AUTO-unfused", "AUTO"])
    parser.add_argument("--starts", type=int, default=2, help="of each variant, in turns")
    parser.add_argument("--together", action="store_true", help="engines of one start at once, passes in turns")
    parser.add_argument("--passes", type=int, help="over all batch sizes")
    parser.add_argument("--requests", type=int, default=256, help="whose tokens are compared; 0: none")
    parser.add_argument("--device", choices=list(sglang_engine.STEPS), default="cuda")
    parser.add_argument("--profile", type=Path, help="write a trace of the largest batch here (kernel_times.py)")
    parser.add_argument("--quiet", metavar="FILE", help="times are taken while this file is locked: others wait")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    return parser.parse_args()


def main() -> None:
    arguments = parsed()

    from llm_allreduce_plugin.measure.environment import write_record

    decode.exit_on_sigterm()
    rows: list[dict[str, Any]] = []
    tp, good = arguments.tp[0], True

    def record() -> None:
        if arguments.out:
            write_record(
                arguments.out,
                rows,
                engine="sglang",
                harness=__doc__,
                device=arguments.device,
                width=arguments.width,
                layers=arguments.layers,
            )

    with tempfile.TemporaryDirectory(prefix="sglang-bench-") as name:
        work = Path(name)
        (work / "probe").mkdir()
        decode.install_probe(work / "probe", ROOT / "benchmarks" / "sglang_probe.py", "sglang.srt.plugins")
        decode.write_model(work / "model", arguments.width, arguments.layers)
        tokens: dict[str, list[list[list[int]]]] = {variant: [] for variant in arguments.variants}
        for start, (variant, answer) in all_starts(arguments, work):
            if isinstance(answer, Exception):
                print(f"TP{tp} {variant:>12}: {answer}", flush=True)
                good = False
                continue  # the others are worth their time
            tokens[variant].append(answer.pop("tokens"))
            row = {"tp": tp, "variant": variant, "start": start, **answer}
            rows.append(row)
            times = decode.times_of(row)
            print(
                f"TP{tp} {variant:>12}: ms per token at batch {BATCHES}: {times}; start {row['start_s']} s", flush=True
            )
            record()
        if arguments.together:
            beside = turns.ratios(rows, BATCHES, STOCK)
            rows.append({"tp": tp, "ratios_to_default": beside})
            print(f"TP{tp}: over default, pass by pass: {beside}", flush=True)
            record()
        if arguments.requests:
            row, equal = compare({name: starts for name, starts in tokens.items() if starts}, tp, arguments.requests)
            good &= equal
            rows.append(row)
            print(f"TP{tp}: {row}", flush=True)
            record()
    sys.exit(not good)


if __name__ == "__main__":
    main()
