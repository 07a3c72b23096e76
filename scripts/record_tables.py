"""Writes the tables of measurements in the documentation, from the records in benchmarks/.

python scripts/record_tables.py            # rewrites the tables between their marks
python scripts/record_tables.py --check    # exits 1 when a page is out of date

A table stands between <!-- table: NAME --> and <!-- end -->; NAME is a key of TABLES below.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- table: ([a-z0-9_]+) -->\n).*?(<!-- end -->)", re.DOTALL)
KIB, MIB = 1 << 10, 1 << 20
MISSING = "-"
BATCHES = (1, 8, 32, 128)
SGLANG_PICTURE = "sglang_ms_per_token"


def record(name: str) -> dict[str, Any]:
    """A record, by its path under ``benchmarks`` without the suffix."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
    return found


def has_record(name: str) -> bool:
    """Whether it was measured."""
    return (ROOT / "benchmarks" / f"{name}.json").exists()


def size(number: int) -> str:
    """65536 as 64K."""
    return f"{number // MIB}M" if number >= MIB else f"{number // KIB}K"


def number(value: float) -> str:
    """To three digits, or all of them before the point."""
    digits = 2 - min(2, math.floor(math.log10(value)))
    return f"{value:.{min(digits, 2)}f}"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with these headings."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def times(name: str, *candidates: str) -> dict[int, float]:
    """Microseconds in a graph by bytes, of the fastest of the candidates."""
    found: dict[int, float] = {}
    for row in record(name)["rows"]:
        if row["candidate"] in candidates and row["graph_us"] is not None:
            found[row["bytes"]] = min(row["graph_us"], found.get(row["bytes"], row["graph_us"]))
    return found


def fastest(labelled: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[int, float]]:
    """Microseconds by bytes, of the fastest row of each label."""
    curves: dict[str, dict[int, float]] = {}
    for label, row in labelled:
        curve = curves.setdefault(label, {})
        curve[row["bytes"]] = min(row["us"], curve.get(row["bytes"], row["us"]))
    return curves


def by_size(lines: dict[str, dict[int, float]], sizes: Iterable[int] | None = None) -> str:
    """A line to each curve, a column to each size."""
    columns = sorted(sizes or {bytes_ for curve in lines.values() for bytes_ in curve})
    rows = [
        [label, *(number(curve[column]) if column in curve else MISSING for column in columns)]
        for label, curve in lines.items()
    ]
    return markdown(["us", *map(size, columns)], rows)


_PEERS = {
    "MINLATENCY": ("MINLATENCY",),
    "LOWPRECISION, fp8": ("LOWPRECISION",),
    "NCCL": ("NCCL",),
    "NCCL, registered windows": ("NCCL-windows",),
    "torch symmetric memory, the faster kernel": ("torch-one-shot", "torch-two-shot"),
}


_SHIPPED = {
    "MINLATENCY": ("MINLATENCY",),
    "FlashInfer": ("FlashInfer",),
    "vLLM's custom all-reduce": ("vLLM-custom",),
    "torch symmetric memory, the faster kernel": ("torch-one-shot", "torch-two-shot"),
    "NCCL": ("NCCL",),
}
_SHIPPED_WITH_NORM = {
    "one kernel": ("fused",),
    "MINLATENCY, then our norm": ("then-norm",),
    "FlashInfer, one kernel": ("FlashInfer",),
    "NCCL, then vLLM's norm": ("NCCL+vLLM-norm",),
}


def beside(name: str, lines: dict[str, tuple[str, ...]]) -> str:
    """What others have beside ours, over four GPUs and over two, each in one run."""
    return by_size({f"{ranks} GPUs: {label}": times(f"h200/{name}_tp{ranks}", *names)
                    for ranks in (4, 2) for label, names in lines.items()})  # fmt: skip


def nvlink_h100_tp4() -> str:
    """The same of four H100."""
    return by_size({label: times("h100/bench_tp4", *names) for label, names in _PEERS.items()})


def nvlink_h100() -> str:
    """The same of two H100."""
    lines = {"AUTO": ("AUTO",)} | {label: names for label, names in _PEERS.items() if label != "MINLATENCY"}
    return by_size({label: times("h100/bench_tp2", *names) for label, names in lines.items()})


def formats_h100_tp2() -> str:
    """Each of the other formats beside the exact kernels, over two H100."""
    wires = ("fp8_group", "tq3", "hadamard2")
    curves = {"MINLATENCY": times("h100/bench_tq3_tp2", "MINLATENCY")}
    return by_size(curves | {wire: times(f"h100/bench_{wire}_tp2", "LOWPRECISION") for wire in wires})


def host_memory_h100() -> str:
    """Through host memory, two H100."""
    lines = {"MINLATENCY": "MINLATENCY", "LOWPRECISION, fp8": "LOWPRECISION", "NCCL without peer access": "NCCL"}
    return by_size({label: times("h100/host_bench_tp2", name) for label, name in lines.items()})


def between_products() -> str:
    """Calls in a row, and behind matrix products."""
    names = ("MINLATENCY", "TWOSHOT", "NCCL")
    places = {"in a row": "h100/bench_in_a_row_tp2", "behind a product": "h100/bench_between_tp2"}
    return by_size({f"{name}, {place}": times(path, name) for name in names for place, path in places.items()})


def workspaces(ranks: int) -> str:
    """Large messages with less memory to pass through: how much slower."""
    rows = record(f"h100/workspace_sizes_tp{ranks}")["rows"]
    names = [name for name in rows[0] if name.endswith("MiB")]
    lines = [[size(row["bytes"]), number(row[names[0]]["us"]), *(f"{row[name]['ratio']:.3f}" for name in names[1:])]
             for row in rows]  # fmt: skip
    return markdown(["bytes", f"{names[0]}, us", *names[1:]], lines)


def host_memory() -> str:
    """All-reduces through host memory."""
    return by_size(
        {
            "4 GPUs: MINLATENCY": times("h200/host_bench_tp4", "MINLATENCY"),
            "4 GPUs: LOWPRECISION, fp8": times("h200/host_bench_tp4", "LOWPRECISION"),
            "4 GPUs: LOWPRECISION, tq3": times("h200/host_bench_tq3_tp4", "LOWPRECISION"),
            "4 GPUs: LOWPRECISION, hadamard2": times("h200/host_bench_hadamard2_tp4", "LOWPRECISION"),
            "4 GPUs: NCCL without peer access": times("h200/host_bench_tp4", "NCCL"),
            "2 GPUs: MINLATENCY": times("h200/host_bench_tp2", "MINLATENCY"),
            "2 GPUs: LOWPRECISION, fp8": times("h200/host_bench_tp2", "LOWPRECISION"),
            "2 GPUs: NCCL without peer access": times("h200/host_bench_tp2", "NCCL"),
        }
    )


def fused() -> str:
    """A layer's boundary in one kernel and in two."""
    rows = record("h100/two_versions_fused_tp2")["rows"]
    one, two = ({row["bytes"]: row["new_graph_us"] for row in rows if row["strategy"] == name}
                for name in ("fused", "then-norm"))  # fmt: skip
    columns = [column for column in sorted(one) if column.bit_length() % 2]
    saved = ["time saved", *(f"{(1 - one[column] / two[column]) * 100:.0f} %" for column in columns)]
    table = by_size({"one kernel": one, "all-reduce, then our norm": two}, columns)
    return table + f"| {' | '.join(saved)} |\n"


def tokens(name: str, variants: dict[str, str], *, more: str | None = None) -> str:
    """Milliseconds per token; a line to each start of each variant. ``more``: a record of further variants."""
    measured = [*record(name)["rows"], *(record(more)["rows"] if more else ())]
    rows = [
        [label, *(f"{row[f'ms_per_token_batch_{batch}']:.3f}" for batch in BATCHES),
         f"{row['prefill_32x1024_s']:.2f} s" if "prefill_32x1024_s" in row else MISSING]
        for variant, label in variants.items()
        for row in measured
        if row.get("variant") == variant
    ]  # fmt: skip
    return markdown(["ms per token", *(f"batch {batch}" for batch in BATCHES), "prefill, 32 x 1024"], rows)


def sglang() -> str:
    """SGLang's own all-reduce and ours, with the picture of both; until there are records, that there are none."""
    names = {width: f"h100/sglang_{width}_tp2" for width in (4096, 8192)}
    there = {width: name for width, name in names.items() if has_record(name)}
    if not there:
        return "Not measured yet.\n"
    parts = [f"![Time per token in SGLang](plots/{SGLANG_PICTURE}.png)\n"] if there == names else []
    for width, name in there.items():
        rows = [
            [label, *(f"{row[f'ms_per_token_batch_{batch}']:.3f}" for batch in BATCHES)]
            for variant, label in (
                ("default", "stock SGLang"),
                ("AUTO-unfused", "AUTO, norm left to SGLang"),
                ("AUTO", "AUTO, norm fused"),
                ("ONESHOT", "ONESHOT, norm fused"),
            )
            for row in record(name)["rows"]
            if row.get("variant") == variant
        ]
        parts += [
            f"Llama, {width} wide (`benchmarks/{name}.json`); a line to each start:\n",
            markdown(["ms per token", *(f"batch {batch}" for batch in BATCHES)], rows),
        ]
    if has_record("h100/sglang_tokens_tp2"):
        (same,) = (row for row in record("h100/sglang_tokens_tp2")["rows"] if "requests" in row)
        equal = same["same_tokens_oneshot_twoshot"]
        stock = ""
        if "same_tokens_as_default" in same:
            stock = f", and {same['same_tokens_as_default']['ONESHOT']} the tokens of stock SGLang, too"
        parts.append(
            f"Of {same['requests']} requests, {equal} had the same tokens with `ONESHOT` and `TWOSHOT`{stock} "
            "(`benchmarks/h100/sglang_tokens_tp2.json`).\n"
        )
    return "\n".join(parts)


def host_cost() -> str:
    """What an eager call costs the host."""
    rows = [
        [str(ranks), size(row["bytes"]), *(number(row[key]) for key in ("all_reduce_us", "bare_launch_us",
                                                                       "output_allocation_us"))]
        for ranks in (2, 4)
        for row in record(f"h200/host_cost_tp{ranks}")["rows"]
    ]  # fmt: skip
    return markdown(["GPUs", "bytes", "call, us", "of it the bare launch", "of it the output's allocation"], rows)


def _of_two_versions(name: str, what: dict[str, str]) -> str:
    """What each took before and takes now."""
    found = {row["what"]: row for row in record(name)["rows"]}
    lines = [[label, *(f"{found[key][when]:.2f}" if when in found[key] else MISSING for when in ("old", "new"))]
             for label, key in what.items()]  # fmt: skip
    return markdown(["", "before", "now"], lines)


def eager() -> str:
    """What an eager call costs the host, in two versions."""
    what = {
        f"an eager call of {size(count)}, over its launch, us": f"calls {count} over_the_launch_us"
        for count in (4 * KIB, 64 * KIB, 256 * KIB)
    }
    return _of_two_versions("h200/eager_and_start_tp2", what)


def start() -> str:
    """What the start of a group and the proofs of check take, in two versions."""
    what = {
        "the first group of a process, s": "start first_s",
        "of it mapping memory, s": "start parts_s memory",
        "a second group, s": "start second_s",
        "`llm-allreduce check`, s": "check_s",
        "without its proofs, s": "check_without_proofs_s",
    }
    return _of_two_versions("h100/eager_and_start_tp2", what)


def forms() -> str:
    """LOWPRECISION's algorithms, of four GPUs, over two links."""
    records = (("NVLink", "h200/forms_fp8_tp4"), ("host memory", "h200/forms_fp8_host_tp4"))
    return by_size(
        fastest((f"{link}: `{row['algorithm']}`", row) for link, name in records for row in record(name)["rows"])
    )


def error_of_one() -> str:
    """Relative error of one all-reduce, by format and data."""
    rows = [row for row in record("accuracy")["rows"] if "data" in row]

    def cell(wire: str | None, data: str) -> str:
        found = [row["relative_l2"] * 100 for row in rows if (row["wire_format"], row["data"]) == (wire, data)]
        return " / ".join(f"{error:#.2g}".rstrip(".") for error in found) + " %"

    bits = {None: "16", "fp8": "8.26", "fp8_group": "8.53", "hadamard2": "2.5", "tq3": "2.5"}
    wires = {wire: ("exact" if wire is None else f"`{wire}`", number) for wire, number in bits.items()}
    lines = [[*names, *(cell(wire, data) for data in ("normal", "heavy-tailed", "outliers"))]
             for wire, names in wires.items()]  # fmt: skip
    heads = ["format", "bits a value", "normal, 2 / 4 / 8 ranks", "heavy-tailed (Student's t, 3)",
             "8 outlier channels x 60"]  # fmt: skip
    return markdown(heads, lines)


def error_of_model() -> str:
    """What becomes of a model's embeddings."""
    found = {(row["wire_format"], row["ranks"]): row for row in record("accuracy")["rows"] if "mean_cosine" in row}
    lines = []
    for wire in ("fp8", "fp8_group", "hadamard2", "tq3"):
        for ranks in (2, 4):
            row = found[wire, ranks]
            digits = 5 if wire.startswith("fp8") else 3
            lines.append([
                f"`{wire}`", str(ranks), f"{row['mean_cosine']:.{digits}f}", f"{row['least_cosine']:.{digits}f}",
                f"{row['nearest_kept'] * 100:.0f} %", f"{row['five_kept'] * 100:.0f} %",
                f"{row['rank_correlation']:.{digits - 1 if wire.startswith('fp8') else digits}f}",
            ])  # fmt: skip
    return markdown(["format", "ranks", "mean cosine", "worst cosine", "nearest sentence kept", "five nearest kept",
                     "rank correlation of all pairs"], lines)  # fmt: skip


def formats() -> str:
    """Exact beside the formats, over two links."""
    lines = []
    for link, prefix in (("NVLink", "h200/bench"), ("pinned host memory", "h200/host_bench")):
        curves = [times(f"{prefix}_tp4", "MINLATENCY")]
        curves += [times(f"{prefix}_{rest}", "LOWPRECISION") for rest in ("tp4", "tq3_tp4", "hadamard2_tp4")]
        lines += [[f"{link}, {size(column)}", *(number(curve[column]) for curve in curves)]
                  for column in (4 * MIB, 16 * MIB, 64 * MIB)]  # fmt: skip
    return markdown(["us", "exact (MINLATENCY)", "fp8", "tq3", "hadamard2"], lines)


def error_of_algorithms() -> str:
    """By how packets move."""
    found = {(row["wire_format"], row["world_size"]): row for row in record("form_errors")["rows"]}

    def cell(wire: str, algorithm: str) -> str:
        if algorithm not in found[wire, 4]:
            return "-"
        errors = [found[wire, ranks][algorithm] * 100 for ranks in (4, 8)]
        return " / ".join(f"{error:#.2g}" if error < 10 else f"{error:.0f}" for error in errors) + " %"  # noqa: PLR2004

    algorithms = ("one_shot", "two_shot", "hierarchical", "ring")
    lines = [[f"{wire}, 4 / 8 ranks", *(cell(wire, algorithm) for algorithm in algorithms)]
             for wire in ("fp8", "fp8_group", "hadamard2", "tq3")]  # fmt: skip
    return markdown(["", *algorithms], lines)


def registered() -> str:
    """UB beside what pushes into slots, over two GPUs and four."""
    rows = []
    for ranks, name in ((2, "h100/bench_tp2"), (4, "h100/bench_tp4")):
        placed, fastest, nccl = (times(name, candidate) for candidate in ("UB", "MINLATENCY", "NCCL"))
        rows += [
            [str(ranks), size(count), number(placed[count]), number(fastest[count]), number(nccl[count])]
            for count in placed
            if count >= 4 * MIB and count.bit_length() % 2 == 1
        ]
    return markdown(["GPUs", "bytes", "UB", "MINLATENCY", "NCCL"], rows)


def fused_tp4() -> str:
    """One kernel at the best of the shapes that were tried, and the fastest sum with the norm behind it: four GPUs."""
    in_one_kernel, two = ("one, in one step", "one, in two steps"), "two kernels"
    curves = fastest(
        (in_one_kernel[row["algorithm"]] if row["what"] == "fused" else two, row)
        for row in record("h100/fused_shapes_tp4")["rows"]
        if row["what"] != "norm alone"
    )
    return by_size({label: curves[label] for label in (*in_one_kernel, two)})


def fused_quant() -> str:
    """One kernel, by how it quantizes."""
    rows = record("h100/two_versions_fused_tp2")["rows"]
    plain = {row["bytes"]: row["new_graph_us"] for row in rows if row["strategy"] == "fused"}
    quants = ("fp8", "fp8-token", "fp8-group", "nvfp4")
    curves = {quant: times(f"h100/bench_fused_{quant.replace('-', '_')}_tp2", "fused") for quant in quants}
    return by_size({"not quantized": plain} | curves, sorted(curves["fp8"]))


def codecs() -> str:
    """What encoding and decoding reach alone, in two versions."""
    found = {(row["wire"], row["direction"]): row for row in record("h200/codec_speed")["rows"]}
    lines = [
        [wire, *(f"{row[when]:.2f}" if when in row else MISSING
                 for row in (found[wire, "encode"], found[wire, "decode"]) for when in ("old_tb_s", "new_tb_s"))]
        for wire in ("fp8", "fp8_group", "tq3", "hadamard2")
    ]  # fmt: skip
    return markdown(["", "encode, before", "now", "decode, before", "now"], lines)


_STOCK = {"default": "stock vLLM"}
_OURS = {"MINLATENCY": "MINLATENCY"}
_LOW = {"LOWPRECISION": "LOWPRECISION, fp8"}
_FUSED = {"MINLATENCY-unfused": "MINLATENCY, norm left to vLLM", "MINLATENCY": "MINLATENCY, norm fused"}
TABLES: dict[str, Callable[[], str]] = {
    "nvlink": lambda: beside("bench", _PEERS),
    "nvlink_h100": nvlink_h100,
    "formats_h100_tp2": formats_h100_tp2,
    "host_memory_h100": host_memory_h100,
    "nvlink_h100_tp4": nvlink_h100_tp4,
    "between_products": between_products,
    "workspaces": lambda: workspaces(2),
    "workspaces_tp4": lambda: workspaces(4),
    "host_memory": host_memory,
    "fused": fused,
    "fused_tp4": fused_tp4,
    "fused_quant": fused_quant,
    "registered": registered,
    "codecs": codecs,
    "shipped": lambda: beside("bench_peers", _SHIPPED),
    "shipped_with_norm": lambda: beside("bench_fused_peers", _SHIPPED_WITH_NORM),
    "eager": eager,
    "start": start,
    "forms": forms,
    "vllm_fused_8192_tp2": lambda: tokens(
        "h200/vllm_fused_8192_tp2",
        _STOCK | {"default-flashinfer": "vLLM with FlashInfer's fused kernel"} | _FUSED,
        more="h200/vllm_flashinfer_8192_tp2",
    ),
    "vllm_fused_4096_tp2": lambda: tokens("h200/vllm_fused_4096_tp2", _STOCK | _FUSED),
    "vllm_fused_8192_tp4": lambda: tokens(
        "h200/vllm_fused_8192_tp4", _STOCK | {"MINLATENCY": "MINLATENCY, norm fused"} | _LOW
    ),
    "vllm_fused_8192_tp2_h100": lambda: tokens("h100/vllm_fused_8192_tp2", _STOCK | _FUSED),
    "vllm_fused_4096_tp2_h100": lambda: tokens("h100/vllm_fused_4096_tp2", _STOCK | _FUSED),
    "vllm_tokens_8192_tp2_h100": lambda: tokens("h100/vllm_tokens_8192_tp2", _FUSED),
    "vllm_fused_8192_tp4_h100": lambda: tokens("h100/vllm_fused_8192_tp4", _FUSED),
    "vllm_fused_fp8_tp2": lambda: tokens("h200/vllm_fused_fp8_tp2", _FUSED),
    "vllm_ub_tp2": lambda: tokens(
        "h200/vllm_ub_tp2",
        {"MINLATENCY-unfused": "MINLATENCY, norm left to vLLM", "UB-unfused": "UB, norm left to vLLM"},
    ),
    "vllm_host_tp2": lambda: tokens("h100/vllm_host_tp2", {"default": "vLLM with NCCL"} | _OURS | _LOW),
    "vllm_8192_tp2": lambda: tokens("h200/vllm_8192_tp2", _STOCK | _OURS | {"AUTO": "AUTO, by a profile of `tune`"}),
    "vllm_8192_tp4": lambda: tokens("h200/vllm_8192_tp4", _STOCK | _OURS),
    "vllm_8192_tp4_host": lambda: tokens("h200/vllm_8192_tp4_host", {"default": "vLLM with NCCL"} | _OURS | _LOW),
    "sglang": sglang,
    "host_cost": host_cost,
    "error_of_one": error_of_one,
    "error_of_model": error_of_model,
    "formats": formats,
    "error_of_algorithms": error_of_algorithms,
}


def with_tables(text: str) -> str:
    """A page with its tables made anew."""
    return TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def main() -> int:
    """Rewrites or checks all pages."""
    wrong = []
    for page in PAGES:
        text = page.read_text()
        if (made := with_tables(text)) != text:
            wrong.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                page.write_text(made)
    if wrong and "--check" in sys.argv[1:]:
        print(f"{', '.join(wrong)}: not of the records as they are: python scripts/record_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
