"""One colour for one thing, in every picture of this package."""

from __future__ import annotations

from collections.abc import Sequence

# Exact kernels are blue, compressed ones orange to red, others' grey, green and purple. Names are those of candidates,
# strategies and wire formats in records; blue and orange are told apart by colour-blind eyes, too.
EXACT = "#0072B2"
LINK = "#111111"
_COLORS = {
    "exact": EXACT,
    "auto": EXACT,
    "minlatency": EXACT,
    "oneshot": "#56B4E9",
    "(one-shot)": "#56B4E9",
    "twoshot": "#003F73",
    "(two-shot)": "#003F73",
    "ub": "#1E90FF",
    "fused": EXACT,
    "then-norm": "#56B4E9",
    "minlatency-unfused": "#56B4E9",
    "auto-unfused": "#56B4E9",
    "lowprecision": "#E69F00",
    "fp8": "#E69F00",
    "fp8_group": "#B07A00",
    "tq3": "#D55E00",
    "hadamard2": "#CC79A7",
    "nccl": "#555555",
    "gloo": "#555555",
    "nccl+vllm-norm": "#555555",
    "nccl-windows": "#9A9A9A",
    "torch-one-shot": "#66C2A5",
    "torch-two-shot": "#009E73",
    "vllm-custom": "#7B3FA0",
    "default": "#7B3FA0",  # an engine's own choice
    "flashinfer": "#A89B00",
    "sglang": "#8C564B",
}
# For what no picture of this package has shown before.
_OTHERS = ("#117733", "#882255", "#44AA99", "#999933")


def color_of(name: str, others: Sequence[str] = ()) -> str:
    """The colour of ``name``. ``others``: all names in the picture; those that nothing is known of differ, too."""
    if (color := _known(name)) is not None:
        return color
    unknown = [other for other in others if _known(other) is None]
    return _OTHERS[unknown.index(name) % len(_OTHERS)] if name in unknown else _OTHERS[0]


def _known(name: str) -> str | None:
    """``LOWPRECISION tq3`` goes by its format, ``TWOSHOT (pull)`` by its strategy."""
    words = name.lower()
    found = (_COLORS.get(word) for word in (words, words.rsplit(" ", 1)[-1], words.split(" ", 1)[0]))
    return next((color for color in found if color is not None), None)
