"""What the pictures of the documentation show: each function draws one, from the records that it is given.

``plots.py`` is the command.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin.bench.palette import EXACT, LINK, color_of
from llm_allreduce_plugin.bench.plot import short_size
from llm_allreduce_plugin.compression.breakeven.model import LINKS, CodecSpeed, seconds
from llm_allreduce_plugin.config import WireFormat

# Fourth-generation NVLink, 18 links of 25 GB/s a direction; PCIe 5.0 x16, 32 GT/s in 128b/130b.
NVLINK_GB_S = 450.0
PCIE5_X16_GB_S = 63.0
TITLES = {
    "MINLATENCY": "this package, exact",
    "LOWPRECISION": "this package, fp8 on the wire",
    "NCCL": "NCCL",
    "NCCL-windows": "NCCL, registered",
    "torch-one-shot": "torch one-shot",
    "torch-two-shot": "torch two-shot",
    "default": "stock vLLM",
    "MINLATENCY-unfused": "this package, norm not fused",
    "fused": "one kernel",
    "then-norm": "all-reduce, then our norm",
}

FUSED_NORM = "this package, norm fused"

Document = Mapping[str, Any]


def times(record: Document, candidate: str) -> dict[int, float]:
    """Microseconds in a graph by bytes per rank."""
    rows = (row for row in record["rows"] if row["candidate"] == candidate)
    return {row["bytes"]: row["graph_us"] for row in rows if row["graph_us"] is not None}


def tokens(record: Document, variant: str, what: str = "ms_per_token") -> dict[int, float]:
    """Milliseconds per token by batch size, or ``what`` else of a step; the mean of the starts.

    None where the variant was not measured.
    """
    rows = [row for row in record["rows"] if row.get("variant") == variant]
    keys = set().union(*rows)
    batches = sorted(int(key.rsplit("_", 1)[1]) for key in keys if key.startswith(f"{what}_batch_"))
    return {batch: sum(row[f"{what}_batch_{batch}"] for row in rows) / len(rows) for batch in batches}


def _link(bandwidth: float) -> str:
    return f"least for exact sums: {bandwidth:g} GB/s a direction"


def _curve(axes: Axes, points: Mapping[int, float], name: str, **style: object) -> None:
    look: dict[str, Any] = {"color": color_of(name), "marker": "o", "markersize": 4, "linewidth": 2, **style}
    axes.plot(list(points), list(points.values()), label=look.pop("label", TITLES.get(name, name)), **look)


def _by_size(axes: Axes) -> None:
    axes.set_xscale("log", base=4)
    axes.xaxis.set_major_formatter(short_size)
    axes.set_xlabel("bytes per rank")
    axes.grid(visible=True, alpha=0.25)


def times_of_nvlink(figure: Figure, records: Sequence[Document]) -> None:
    """Who is fastest at which size, and how far from the link?"""
    figure.suptitle("4 x H200, NVLink: time of an all-reduce in a CUDA graph, bf16")
    (record,) = records
    axes = figure.subplots()
    for name in ("NCCL", "NCCL-windows", "torch-one-shot", "torch-two-shot", "LOWPRECISION", "MINLATENCY"):
        thick = {"linewidth": 3.2, "zorder": 3} if name == "MINLATENCY" else {}
        _curve(axes, times(record, name), name, **thick)
    ranks = record["world_size"]
    sizes = [size for size in times(record, "MINLATENCY") if size >= 1 << 20]
    least = {size: 2 * (ranks - 1) / ranks * size / NVLINK_GB_S / 1e3 for size in sizes}
    _curve(axes, least, "", color=LINK, marker="", linestyle=":", label=_link(NVLINK_GB_S))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("microseconds")
    axes.set_ylim(1.3, 2500)
    _by_size(axes)
    axes.legend()


def times_through_host_memory(figure: Figure, records: Sequence[Document]) -> None:
    """The same for GPUs that do not reach each other's memory."""
    figure.suptitle("4 x H200 without peer access: time of an all-reduce through host memory, bf16")
    record, tq3, hadamard2 = records
    axes = figure.subplots()
    _curve(axes, times(record, "NCCL"), "NCCL")
    _curve(axes, times(record, "MINLATENCY"), "MINLATENCY", linewidth=3.2, zorder=3)
    _curve(axes, times(record, "LOWPRECISION"), "fp8", label="this package, fp8 on the wire")
    _curve(axes, times(hadamard2, "LOWPRECISION"), "hadamard2", label="hadamard2 on the wire")
    _curve(axes, times(tq3, "LOWPRECISION"), "tq3", label="tq3 on the wire")
    # Two-shot reads the others' shares of this rank's part, and their results: 2 (N - 1) / N of the message.
    ranks = record["world_size"]
    read = {size: 2 * (ranks - 1) / ranks * size for size in times(record, "MINLATENCY") if size >= 1 << 18}
    least = {size: loaded / PCIE5_X16_GB_S / 1e3 for size, loaded in read.items()}
    _curve(axes, least, "", color=LINK, marker="", linestyle=":", label=_link(PCIE5_X16_GB_S))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("microseconds")
    _by_size(axes)
    axes.legend()


def speed_up(figure: Figure, records: Sequence[Document]) -> None:
    """How much faster than what torch and engines without a custom all-reduce run?"""
    figure.suptitle("How many times faster than NCCL, same node, same run (exact kernels, bf16)")
    axes = figure.subplots()
    looks = (("NVLink, 4 H200", "-", "o"), ("NVLink, 2 H200", "--", "o"),
             ("no peer access, 4 H200", "-", "s"), ("no peer access, 2 H200", "--", "s"))  # fmt: skip
    for record, (label, line, marker) in zip(records, looks, strict=True):
        ours, nccl = times(record, "MINLATENCY"), times(record, "NCCL")
        color = EXACT if "NVLink" in label else "#003F73"
        _curve(axes, {size: nccl[size] / ours[size] for size in ours}, "", color=color, linestyle=line,
               marker=marker, label=label)  # fmt: skip
    axes.axhline(1, color=LINK, linestyle=":")
    axes.set_ylim(0, 5.5)
    axes.set_ylabel("NCCL's time / this package's")
    _by_size(axes)
    axes.legend()


def speed_up_over_peers(figure: Figure, records: Sequence[Document]) -> None:
    """How much faster than others that know this topology: torch's kernels, and what engines run by themselves?"""
    figure.suptitle("How many times faster than others, same node, same run (exact kernels, bf16)")
    four, two, *engines = figure.subplots(1, 3, width_ratios=(3, 3, 2.4))
    for axes, record, title in zip((four, two), records, ("4 H200, NVLink", "2 H200, NVLink"), strict=False):
        ours = times(record, "MINLATENCY")
        for name in ("NCCL", "NCCL-windows", "torch-one-shot", "torch-two-shot"):
            theirs = times(record, name)
            _curve(axes, {size: theirs[size] / ours[size] for size in ours if size in theirs}, name)
        axes.axhline(1, color=LINK, linestyle=":")
        axes.set_title(title, fontsize=13)
        axes.set_ylim(0, 5.5)
        _by_size(axes)
        axes.xaxis.set_major_locator(LogLocator(base=4**3))
    two.tick_params(labelleft=False)
    four.set_ylabel("others' time / this package's")
    figure.legend(*four.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    (axes,) = engines
    looks = (("MINLATENCY", "vLLM 0.26, 2 H200", "-", "o"), ("ONESHOT", "SGLang 0.5.17, 2 H100", "-", "^"))
    for record, (variant, label, line, marker) in zip(records[2:], looks, strict=True):
        stock, found = tokens(record, "default"), tokens(record, variant)
        color = color_of("sglang" if "SGLang" in label else "default")
        points = {batch: stock[batch] / found[batch] for batch in stock}
        _curve(axes, points, "", label=label, color=color, linestyle=line, marker=marker)
    axes.axhline(1, color=LINK, linestyle=":")
    axes.set_title("engines: time per token", fontsize=13)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(points), list(map(str, points)))
    axes.set_ylim(0.98, 1.15)
    axes.set_xlabel("batch size")
    axes.grid(visible=True, alpha=0.25)
    axes.legend(fontsize=10)


def ms_per_token(figure: Figure, records: Sequence[Document]) -> None:
    """What does a served token gain? Over four GPUs vLLM's processes are waited for: there, what the GPU gains."""
    figure.suptitle("vLLM 0.26, Llama 8192 wide x 16 layers: time per token saved against stock vLLM")
    panels = figure.subplots(1, 3, sharey=True)
    titles = ("2 H200, NVLink", "4 H200, NVLink, on the GPU", "4 H200, no peer access")
    measured = ("ms_per_token", "gpu_ms", "ms_per_token")
    both = ("MINLATENCY-unfused", "MINLATENCY")
    shown = (both, both, ("MINLATENCY", "LOWPRECISION"))
    for axes, record, title, names, what in zip(panels, records, titles, shown, measured, strict=True):
        stock = tokens(record, "default", what)
        width = 0.4
        for number, name in enumerate(names):
            found = tokens(record, name, what)
            # The last of the records has no fused norm.
            is_fused = any("(fused norm)" in call for call in _calls(record, name))
            kind = name if is_fused or name != "MINLATENCY" else "MINLATENCY-unfused"
            places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(stock))]
            saved = [(1 - found[batch] / stock[batch]) * 100 for batch in stock]
            label = FUSED_NORM if is_fused else TITLES[kind]
            axes.bar(places, saved, width, color=color_of(kind), label=label)
            for place, height, batch in zip(places, saved, stock, strict=True):  # above the axis where it is negative
                text = f"{found[batch]:.2f} ms"
                axes.text(place, max(height, 0) + 0.8, text, rotation=90, fontsize=11, ha="center", va="bottom")
        axes.set_xticks(range(len(stock)), [f"{batch}\n{stock[batch]:.2f} ms" for batch in stock], fontsize=11)
        axes.set_title(title, fontsize=13)
        axes.set_xlabel("batch size, and stock vLLM's time")
        axes.set_ylim(-2, 52)
        axes.grid(visible=True, axis="y", alpha=0.25)
    panels[0].set_ylabel("time per token saved, %")
    shown_in = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels]
    handles = {label: handle for pairs in shown_in for handle, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)


def sglang_ms_per_token(figure: Figure, records: Sequence[Document]) -> None:
    """What does a token cost in SGLang, by its own all-reduce and by ours? ONESHOT is what AUTO runs at these sizes."""
    version = next(row["version"] for row in records[0]["rows"] if "version" in row)
    figure.suptitle(f"SGLang {version}, {records[0]['environment']['gpus']}: time per token, mean of the starts")
    panels = figure.subplots(1, len(records))
    labels = {"default": "stock SGLang", "AUTO-unfused": TITLES["MINLATENCY-unfused"], "AUTO": FUSED_NORM}
    width = 0.27
    for axes, record in zip(panels, records, strict=True):
        for number, (name, label) in enumerate(labels.items()):
            found = tokens(record, name) or (tokens(record, "ONESHOT") if name == "AUTO" else {})
            if not found:
                continue
            places = [place + (number - 1) * width for place in range(len(found))]
            bars = axes.bar(places, list(found.values()), width, color=color_of(name), label=label)
            axes.bar_label(bars, [f"{time:.2f}" for time in found.values()], rotation=90, fontsize=11, padding=3)
        batches = list(tokens(record, "default"))
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set_title(f"Llama {record['width']} wide x {record['layers']} layers", fontsize=13)
        axes.set_xlabel("batch size")
        axes.margins(y=0.2)
        axes.grid(visible=True, axis="y", alpha=0.25)
    panels[0].set_ylabel("milliseconds per token")
    legend = max((axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[1]))
    figure.legend(*legend, loc="outside lower center", ncols=3)


def _calls(record: Document, variant: str) -> set[str]:
    """What ran, by name."""
    rows = [row for row in record["rows"] if row.get("variant") == variant]
    return {call for row in rows for report in row["reports"] for call in report["calls"]}


def fused_boundary(figure: Figure, records: Sequence[Document]) -> None:
    """What does one kernel for the layer's boundary gain?"""
    figure.suptitle("2 x H100: all-reduce, residual and RMSNorm in a CUDA graph, bf16, rows of 8192")
    (record,) = records
    clock, saved = figure.subplots(1, 2)
    one, two = ({row["bytes"]: row["new_graph_us"] for row in record["rows"] if row["strategy"] == name}
                for name in ("fused", "then-norm"))  # fmt: skip
    for name, curve in (("then-norm", two), ("fused", one)):
        _curve(clock, curve, name)
    clock.set_yscale("log")
    clock.yaxis.set_major_formatter("{x:g}")
    clock.set_ylabel("microseconds")
    clock.legend()
    _curve(saved, {size: (1 - one[size] / two[size]) * 100 for size in one}, "fused")
    saved.set_ylim(0, 40)
    saved.set_ylabel("time saved by one kernel, %")
    for axes in (clock, saved):
        _by_size(axes)


def formats(figure: Figure, records: Sequence[Document]) -> None:
    """What does a format gain in time, and what does it cost in accuracy?"""
    figure.suptitle("64 MiB over 4 H200, by wire format: error against bandwidth")
    accuracy, *measured = records
    errors = {row["wire_format"] or "exact": row["relative_l2"] for row in accuracy["rows"]
              if row.get("data") == "normal" and row["ranks"] == 4}  # fmt: skip
    size = 64 << 20
    for axes, (exact, tq3, hadamard2), title in zip(
        figure.subplots(1, 2, sharey=True), (measured[:3], measured[3:]), ("NVLink", "host memory"), strict=True
    ):
        found = {
            "exact": times(exact, "MINLATENCY")[size],
            "fp8": times(exact, "LOWPRECISION")[size],
            "tq3": times(tq3, "LOWPRECISION")[size],
            "hadamard2": times(hadamard2, "LOWPRECISION")[size],
        }
        rates = {name: size / time / 1e3 for name, time in found.items()}
        most = max(rates.values())
        for name, rate in rates.items():
            axes.plot(rate, errors[name] * 100, marker="o", markersize=13, color=color_of(name))
            left = rate > most * 0.7
            axes.annotate(f"{name}, {errors[name] * 100:.2g} %", (rate, errors[name] * 100), fontsize=13,
                          xytext=(-12 if left else 12, -5), textcoords="offset points",
                          ha="right" if left else "left")  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0.08, 200)
        axes.set_xlim(0, most * 1.1)
        axes.set_title(title, fontsize=13)
        axes.set_xlabel("size of the message / time, GB/s")
        axes.grid(visible=True, alpha=0.25)
    figure.axes[0].set_ylabel("relative L2 error of one all-reduce, %")


def break_even(figure: Figure, records: Sequence[Document]) -> None:
    """On which links does a format pay, by the speed of its codec alone?"""
    (record,) = records
    size, ranks = record["bytes"], record["ranks"]
    figure.suptitle(f"{size >> 20} MiB over {ranks} ranks: time by the model, codecs as measured on {record['where']}")
    axes = figure.subplots()
    links = [5 * 200 ** (step / 60) for step in range(61)]  # GB/s, 5 to 1000
    _curve(axes, {link: seconds(size, ranks, link) * 1e3 for link in links}, "exact", marker="")
    for row in record["rows"]:
        wire, speed = WireFormat(row["wire_format"]), CodecSpeed(row["encode"], row["decode"])
        _curve(axes, {link: seconds(size, ranks, link, wire, speed) * 1e3 for link in links}, wire, marker="")
    for name, link in LINKS.items():
        axes.axvline(link, linestyle=":", color=LINK, linewidth=1)
        axes.annotate(f"{name} ", (link, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right",
                      fontsize=11)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("link bandwidth, GB/s a direction")
    axes.set_ylabel("milliseconds")
    axes.grid(visible=True, alpha=0.25)
    axes.legend(loc="lower left")
