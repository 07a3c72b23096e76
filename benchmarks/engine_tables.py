"""Tables of the documentation about engines: milliseconds per token."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import MISSING, has_record, markdown, record

BATCHES = (1, 8, 32, 128)
SGLANG_PICTURE = "sglang_ms_per_token"
OF_SGLANG = {
    "default": "stock SGLang",
    "AUTO-unfused": "AUTO, norm left to SGLang",
    "AUTO": "AUTO, norm fused",
    "ONESHOT": "ONESHOT, norm fused",
}


def _by_batch(row: dict[str, Any], what: str) -> list[str]:
    return [f"{row[f'{what}_batch_{batch}']:.3f}" for batch in BATCHES]


def tokens(name: str, variants: dict[str, str], *, more: str | None = None, of_gpu: bool = False) -> str:
    """Milliseconds per token; a line to each start of each variant. ``more``: a record of further variants.

    ``of_gpu``: below, lines of what the GPU takes of it. Of engines that were there at once, last, what a variant takes
    of the stock engine's time in the pass beside it, the median.
    """
    measured = [*record(name)["rows"], *(record(more)["rows"] if more else ())]
    starts = [(label, row) for variant, label in variants.items() for row in measured if row.get("variant") == variant]
    rows = [
        [label, *_by_batch(row, "ms_per_token"),
         f"{row['prefill_32x1024_s']:.2f} s" if "prefill_32x1024_s" in row else MISSING]
        for label, row in starts
    ]  # fmt: skip
    if of_gpu:
        rows += [[f"{label}: on the GPU", *_by_batch(row, "gpu_ms"), ""] for label, row in starts]
    rows += [
        [f"{variants[variant]}: of stock, pass by pass", *(f"{100 * ratio:.1f} %" for ratio in ratios.values()), ""]
        for row in measured
        for variant, ratios in row.get("ratios_to_default", {}).items()
    ]
    heads = ["ms per token", *(f"batch {batch}" for batch in BATCHES), "prefill, 32 x 1024"]
    if all("prefill_32x1024_s" not in row for _, row in starts):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return markdown(heads, rows)


def sglang() -> str:
    """SGLang's own all-reduce and ours, with the picture of both; until there are records, that there are none."""
    names = {width: f"h100/sglang_{width}_tp2" for width in (4096, 8192)}
    there = {width: name for width, name in names.items() if has_record(name)}
    if not there:
        return "Not measured yet.\n"
    parts = [f"![Time per token in SGLang](plots/{SGLANG_PICTURE}.png)\n"] if there == names else []
    for width, name in there.items():
        parts += [
            f"Llama, {width} wide (`benchmarks/{name}.json`); a line to each start:\n",
            tokens(name, OF_SGLANG),
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
