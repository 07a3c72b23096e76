"""Tables of the documentation about kernels: sums over each link, with a norm behind them, and what the host does."""

from __future__ import annotations

import collections
import statistics

from benchmarks.clusters_leave import first_gpc
from benchmarks.tables import KIB, MIB, MISSING, by_size, fastest, markdown, number, record, size, times

PEERS = {
    "MINLATENCY": ("MINLATENCY",),
    "LOWPRECISION, fp8": ("LOWPRECISION",),
    "NCCL": ("NCCL",),
    "NCCL, registered windows": ("NCCL-windows",),
    "torch symmetric memory, the faster kernel": ("torch-one-shot", "torch-two-shot"),
}


SHIPPED = {
    "MINLATENCY": ("MINLATENCY",),
    "FlashInfer": ("FlashInfer",),
    "vLLM's custom all-reduce": ("vLLM-custom",),
    "torch symmetric memory, the faster kernel": ("torch-one-shot", "torch-two-shot"),
    "NCCL": ("NCCL",),
}
SHIPPED_WITH_NORM = {
    "one kernel": ("fused",),
    "MINLATENCY, then our norm": ("then-norm",),
    "FlashInfer, one kernel": ("FlashInfer",),
    "SGLang, one kernel": ("SGLang",),
    "NCCL, then vLLM's norm": ("NCCL+vLLM-norm",),
}


def beside(name: str, lines: dict[str, tuple[str, ...]]) -> str:
    """What others have beside ours, over four GPUs and over two, each in one run."""
    curves = {f"{ranks} GPUs: {label}": times(f"h200/{name}_tp{ranks}", *names)
              for ranks in (4, 2) for label, names in lines.items()}  # fmt: skip
    return by_size({label: curve for label, curve in curves.items() if curve})


def sglang() -> str:
    """SGLang's own kernels beside ours, over four GPUs and over two."""
    lines = {"MINLATENCY": "MINLATENCY", "SGLang's own": "SGLang", "vLLM's custom all-reduce": "vLLM-custom"}
    sizes = times("h200/bench_sglang_tp2", "SGLang")
    curves = {f"{ranks} GPUs: {label}": times(f"h200/bench_sglang_tp{ranks}", name)
              for ranks in (4, 2) for label, name in lines.items()}  # fmt: skip
    return by_size({label: curve for label, curve in curves.items() if curve}, sizes)


PUSHING_WARPS = (160, 192, 224, 256, 320, 384, 448, 512)
HIDDEN = (2880, 4096, 5120, 7168, 8192, 16384)


def fused_hidden() -> str:
    """One kernel and two over two GPUs, by hidden size; sizes are rounded down to whole rows."""
    sizes = [64 * KIB, 256 * KIB, MIB, 2 * MIB, 4 * MIB]
    curves: dict[str, dict[int, float]] = {}
    for hidden in HIDDEN:
        for label, candidate in (("one kernel", "fused"), ("two", "then-norm")):
            found = times(f"h200/bench_fused_{hidden}_tp2", candidate)
            row = 2 * hidden
            curves[f"{hidden}, {label}"] = {
                nominal: found[nominal // row * row] for nominal in sizes if nominal // row * row in found
            }
    return by_size(curves, sizes)


def pushing_warps() -> str:
    """One kernel of 6560 rows, by hidden size and the warps that only push, to whole blocks of them."""
    rows = [
        row
        for row in record("h200/fused_pushing_warps_tp2")["rows"]
        if row["variant"] == "as it is" and row["rows"] == 6560
    ]
    lines = []
    for hidden in sorted({row["hidden"] for row in rows}):
        found = sorted((row["scatter_lanes"] * row["threads"], row["us"]) for row in rows if row["hidden"] == hidden)
        lines.append([str(hidden), *(number(us) for _, us in found)])
    return markdown(["hidden size", *(f"{warps} warps" for warps in PUSHING_WARPS)], lines)


def product_by_gpc() -> str:
    """A matrix product by the GPC at which its clusters begin, behind kernels that have blocks enough to be fast."""
    found = record("h100/product_behind")
    begins_at = [first_gpc([int(place) for place in order.split()]) for order in found["orders"]]
    times: dict[tuple[int, int], list[float]] = collections.defaultdict(list)
    for row in found["rows"]:
        if row["cluster"] and row["blocks"] >= min(row["rows"], 64):
            times[row["rows"], begins_at[row["places"]]].append(row["product_us"])
    gpcs = sorted({gpc for _, gpc in times})
    lines = [
        [f"{rows} rows" if rows > 1 else "1 row", *(f"{statistics.median(times[rows, gpc]):.1f}" for gpc in gpcs)]
        for rows in dict.fromkeys(rows for rows, _ in times)
    ]
    return markdown(["us", *(f"GPC {gpc}" for gpc in gpcs)], lines)


def before_and_after() -> str:
    """Two GPUs, over both links: the kernels before they were worked on, and now."""
    rows = record("h200/two_versions_tp2")["rows"]
    lines = {"exact": "MINLATENCY", "fp8": "LOWPRECISION"}
    curves = {
        f"{link}, {label}, {word}": {
            row["bytes"]: row[f"{version}_graph_us"]
            for row in rows
            if (row["transport"], row["strategy"]) == (transport, strategy)
        }
        for transport, link in (("auto", "NVLink"), ("host", "host memory"))
        for label, strategy in lines.items()
        for version, word in (("old", "before"), ("new", "now"))
    }
    return by_size(curves, [64 * KIB, 256 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 64 * MIB])


def nvlink_h100_tp4() -> str:
    """The same of four H100."""
    return by_size({label: times("h100/bench_tp4", *names) for label, names in PEERS.items()})


def nvlink_h100() -> str:
    """The same of two H100, with two sizes more of another run."""
    lines = {"AUTO": ("AUTO",)} | {label: names for label, names in PEERS.items() if label != "MINLATENCY"}
    curves = {label: times("h100/bench_tp2", *names) for label, names in lines.items()}
    another = times("h100/bench_fp8_group_tp2", "MINLATENCY")
    columns = {*curves["AUTO"], 2 * MIB, 8 * MIB}
    return by_size(curves | {"MINLATENCY, another run": another}, columns)


def formats_h100_tp2() -> str:
    """Each of the other formats beside the exact kernels, over two H100."""
    wires = ("fp8_group", "tq3", "hadamard2")
    curves = {"MINLATENCY": times("h100/bench_tq3_tp2", "MINLATENCY")}
    curves |= {wire: times(f"h100/bench_{wire}_tp2", "LOWPRECISION") for wire in wires}
    return by_size(curves, curves["fp8_group"])


def formats_h100_tp4() -> str:
    """The formats of 2.5 bits beside the exact kernels and fp8, over four H100."""
    curves = {"MINLATENCY": times("h100/bench_tq3_tp4", "MINLATENCY")}
    curves |= {wire: times(f"h100/bench_{wire}_tp4", "LOWPRECISION") for wire in ("tq3", "hadamard2")}
    fp8 = times("h100/bench_tp4", "LOWPRECISION")
    return by_size(curves | {"fp8": fp8}, [column for column in fp8 if column in curves["tq3"]])


def flagged_packets() -> str:
    """tq3 by flags with a warp's packets of one peer after the other in one block to a multiprocessor, and as it is."""
    lines: dict[str, dict[int, float]] = {}
    for ranks in (2, 4):
        before = times(f"h100/tq3_one_block_tp{ranks}", "LOWPRECISION")
        now = times(f"h100/bench_tq3_tp{ranks}", "LOWPRECISION")
        lines |= {f"{ranks} GPUs, before": before, f"{ranks} GPUs, now": {column: now[column] for column in before}}
    return by_size(lines)


def host_memory_h100() -> str:
    """Through host memory, four H100 and two."""
    lines = {"MINLATENCY": "MINLATENCY", "LOWPRECISION, fp8": "LOWPRECISION", "NCCL without peer access": "NCCL"}
    return by_size({f"{ranks} GPUs: {label}": times(f"h100/host_bench_tp{ranks}", name)
                    for ranks in (4, 2) for label, name in lines.items()})  # fmt: skip


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


def host_link(ranks: int, most: int = 16 * MIB) -> str:
    """What PCIe carries to and from host memory for so many GPUs at once: of each kind the fastest shape.

    ``most``: bytes of the largest message that is shown.
    """
    labels = {
        "stores": "stores alone",
        "loads": "loads alone",
        "both": "both at once",
        "engines": "both, by copy engines",
        "exchange": "an exchange, a flag to a tile",
    }
    rows = [row for row in record(f"h200/host_link_tp{ranks}")["rows"] if row["bytes"] <= most]
    curves = fastest((labels[row["what"]], row) for row in rows)
    return by_size({label: curves[label] for label in labels.values() if label in curves})


def host_asks_first() -> str:
    """Through host memory in band, before and after large calls ask for what they wait for before they clear."""
    lines = (
        (4, "ONESHOT in band", "exact, one step", (128, 256)),
        (4, "TWOSHOT in band", "exact, two steps", (64, 128, 256, 512)),
        (4, "fp8 in band", "`fp8`, two steps", (64, 128, 256, 512, 1024)),
        (2, "TWOSHOT in band", "exact, two steps", (64, 128, 256, 512, 1024)),
        (2, "fp8 in band", "`fp8`, two steps", (256, 512, 1024)),
    )
    variants = {"before": "cleared", "now": "large calls"}  # how they begin
    return by_size(
        fastest(
            (f"{ranks} GPUs, {label}: {when}", row)
            for ranks, kernel, label, sizes in lines
            for when, variant in variants.items()
            for row in record(f"h200/host_asks_first_tp{ranks}")["rows"]
            if row["kernel"] == kernel and row["bytes"] // KIB in sizes and row["variant"].startswith(variant)
        )
    )


def fused() -> str:
    """A layer's boundary in one kernel and in two."""
    rows = record("h100/two_versions_fused_tp2")["rows"]
    one, two = ({row["bytes"]: row["new_graph_us"] for row in rows if row["strategy"] == name}
                for name in ("fused", "then-norm"))  # fmt: skip
    columns = sorted(one)
    saved = ["time saved", *(f"{(1 - one[column] / two[column]) * 100:.0f} %" for column in columns)]
    table = by_size({"one kernel": one, "all-reduce, then our norm": two}, columns)
    return table + f"| {' | '.join(saved)} |\n"


def host_cost() -> str:
    """What an eager call costs the host."""
    rows = [
        [str(ranks), size(row["bytes"]), *(number(row[key]) for key in ("all_reduce_us", "bare_launch_us",
                                                                       "output_allocation_us"))]
        for ranks in (2, 4)
        for row in record(f"h200/host_cost_tp{ranks}")["rows"]
    ]  # fmt: skip
    return markdown(["GPUs", "bytes", "call, us", "of it the bare launch", "of it the output's allocation"], rows)


def eager() -> str:
    """What an eager call costs the host, in two versions, on two nodes."""
    lines = []
    for gpus in ("H200", "H100"):
        found = {row["what"]: row for row in record(f"{gpus.lower()}/eager_and_start_tp2")["rows"]}
        for count in (4 * KIB, 64 * KIB, 256 * KIB):
            keys = ("all_reduce", "bare_launch", "output", "over_the_launch")
            call, launch, output, over = (found[f"calls {count} {key}_us"] for key in keys)
            cells = (call["new"], launch["new"], over["old"], over["new"], output["old"], output["new"])
            lines.append([f"2 {gpus}", size(count), *(number(cell) for cell in cells)])
    heads = ["GPUs", "bytes", "call, us", "of it the launch", "over the launch, before", "now",
             "`torch.empty_like`, before", "now"]  # fmt: skip
    return markdown(heads, lines)


def start() -> str:
    """What the start of a group and the proofs of check take, in two versions."""
    what = {
        "the first group of a process, s": "start first_s",
        "of it mapping memory, s": "start parts_s memory",
        "a second group, s": "start second_s",
        "`llm-allreduce check`, s": "check_s",
        "without its proofs, s": "check_without_proofs_s",
    }
    found = {row["what"]: row for row in record("h100/eager_and_start_tp2")["rows"]}
    lines = [[label, *(f"{found[key][when]:.2f}" for when in ("old", "new"))] for label, key in what.items()]
    return markdown(["", "before", "now"], lines)


def forms() -> str:
    """LOWPRECISION's algorithms, of four GPUs, over two links."""
    records = (
        ("NVLink, `fp8`", "h200/forms_fp8_tp4"),
        ("NVLink, `tq3`", "h200/forms_tq3_tp4"),
        ("NVLink, `hadamard2`", "h200/forms_hadamard2_tp4"),
        ("host memory, `fp8`", "h200/forms_fp8_host_tp4"),
    )
    return by_size(
        fastest((f"{what}: `{row['algorithm']}`", row) for what, name in records for row in record(name)["rows"])
    )


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
    """What encoding and decoding reach alone, in two versions, on two GPUs."""
    lines = []
    for gpu in ("H200", "H100"):
        found = {(row["wire"], row["direction"]): row for row in record(f"{gpu.lower()}/codec_speed")["rows"]}
        lines += [
            [f"{gpu}, {wire}", *(f"{row[when]:.2f}" if when in row else MISSING
                                 for row in (found[wire, "encode"], found[wire, "decode"])
                                 for when in ("old_tb_s", "new_tb_s"))]
            for wire in ("fp8", "fp8_group", "tq3", "hadamard2")
            if (wire, "encode") in found
        ]  # fmt: skip
    return markdown(["TB/s", "encode, before", "now", "decode, before", "now"], lines)


def two_hosts() -> str:
    """Two hosts made of four GPUs of one machine: forms beside NCCL, over sockets on the loopback device."""
    labels = {"exchange": "the exchange of AUTO's sums alone"} | {wire: f"LOWPRECISION, {wire}" for wire in
                                                                  ("fp8", "tq3", "hadamard2")}  # fmt: skip
    rows = record("h200/hosts_2x2")["rows"]
    names = ("ONESHOT", "TWOSHOT", "AUTO", "fp8", "tq3", "hadamard2", "exchange", "NCCL")
    return by_size({labels.get(name, name): {row["bytes"]: row["us"] for row in rows if row["name"] == name}
                    for name in names})  # fmt: skip


def fp8_in_steps() -> str:
    """FP8 over two H100: the fastest of the shapes tried, in one step and in two, and of fp8_group in one."""
    curves = fastest(
        ("fp8, in one step" if row["form"] == "one_shot" else "fp8, in two steps", row)
        for row in record("h100/low_precision_shapes_tp2")["rows"]
    )
    beside = fastest(
        (f"{row['wire_format']}, in one step, another run", row)
        for row in record("h100/low_precision_shapes_group_tp2")["rows"]
    )
    return by_size(dict(sorted(curves.items())) | beside)
