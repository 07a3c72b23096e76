"""The pictures of the documentation, from recorded measurements. Needs no GPU.

    python benchmarks/plots.py                    # all, into docs/plots
    python benchmarks/plots.py --out /tmp/plots
    python benchmarks/plots.py --check            # exits 1 when a picture is not of the records as they are

Each picture keeps a digest of the records that it was drawn from.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import pictures
from benchmarks.pictures import Document

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks"
PICTURES = ROOT / "docs" / "plots"
DIGEST = "records"  # the key under which a picture keeps it
DOTS_PER_INCH = 130


def load(name: str) -> Document:
    """A record, by its path under ``benchmarks`` without the suffix."""
    document: Document = json.loads((RECORDS / f"{name}.json").read_text())
    return document


class Picture(NamedTuple):
    """A picture: how it is drawn, and from which records."""

    draw: Callable[[Figure, Sequence[Document]], None]
    records: tuple[str, ...]
    height: float = 5.2


WANTED = {
    "nvlink": Picture(pictures.times_of_nvlink, ("h200/bench_tp4",)),
    "host_memory": Picture(
        pictures.times_through_host_memory,
        ("h200/host_bench_tp4", "h200/host_bench_tq3_tp4", "h200/host_bench_hadamard2_tp4"),
    ),
    "speed_up": Picture(
        pictures.speed_up, ("h200/bench_tp4", "h200/bench_tp2", "h200/host_bench_tp4", "h200/host_bench_tp2"), 4.6
    ),
    "speed_up_over_peers": Picture(
        pictures.speed_up_over_peers,
        ("h200/bench_tp4", "h200/bench_tp2", "h200/vllm_together_tp2", "h100/sglang_4096_tp2"),
    ),
    "ms_per_token": Picture(
        pictures.ms_per_token, ("h200/vllm_together_tp2", "h200/vllm_gpu_tp4", "h200/vllm_8192_tp4_host")
    ),
    "sglang_ms_per_token": Picture(pictures.sglang_ms_per_token, ("h100/sglang_4096_tp2", "h100/sglang_8192_tp2")),
    "fused_boundary": Picture(pictures.fused_boundary, ("h100/two_versions_fused_tp2",), 4.6),
    "breakeven": Picture(pictures.break_even, ("h100/breakeven",), 4.6),
    "formats": Picture(
        pictures.formats,
        ("accuracy", "h200/bench_tp4", "h200/bench_tq3_tp4", "h200/bench_hadamard2_tp4", "h200/host_bench_tp4",
         "h200/host_bench_tq3_tp4", "h200/host_bench_hadamard2_tp4"),
    ),
}  # fmt: skip


# A picture of what was not measured yet waits for its records.
DRAWN = {
    name: picture
    for name, picture in WANTED.items()
    if all((RECORDS / f"{record}.json").exists() for record in picture.records)
}


def digest(name: str) -> str:
    """Of the records that a picture is drawn from."""
    found = hashlib.sha256()
    for record in DRAWN[name].records:
        found.update(record.encode() + (RECORDS / f"{record}.json").read_bytes())
    return found.hexdigest()


def draw(name: str, folder: Path) -> Path:
    """Draws a picture into ``folder``."""
    picture = DRAWN[name]
    with mpl.rc_context({"font.size": 13, "legend.fontsize": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, picture.height), layout="constrained")
        picture.draw(figure, [load(record) for record in picture.records])
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH, metadata={DIGEST: digest(name)})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    path.write_bytes(drawn.getvalue())
    return path


def outdated() -> list[str]:
    """Pictures in docs/plots that are not of the records as they are, and files that no picture is named after."""
    found = {path.stem: path for path in PICTURES.iterdir()}
    wrong = [name for name in DRAWN if name not in found]
    for name, path in found.items():
        kept = Image.open(path).info.get(DIGEST) if name in DRAWN else None
        if name not in DRAWN or kept != digest(name):
            wrong.append(name)
    return sorted(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURES)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.check:
        if wrong := outdated():
            print(f"docs/plots: {', '.join(wrong)}: not of the records as they are: python benchmarks/plots.py")
        return 1 if wrong else 0
    for name in DRAWN:
        print(draw(name, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
