"""Tables of the documentation about wire formats: what they cost in accuracy, and what they take."""

from __future__ import annotations

from benchmarks.tables import MIB, markdown, number, record, size, times


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
        return " / ".join(f"{error:#.2g}" if error < 10 else f"{error:.0f}" for error in errors) + " %"

    algorithms = ("one_shot", "two_shot", "hierarchical", "ring")
    lines = [[f"{wire}, 4 / 8 ranks", *(cell(wire, algorithm) for algorithm in algorithms)]
             for wire in ("fp8", "fp8_group", "hadamard2", "tq3")]  # fmt: skip
    return markdown(["", *algorithms], lines)
