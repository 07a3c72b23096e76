"""Quantizations of a norm in an engine's graph, in every spelling that engines have for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from llm_allreduce_plugin.engines.common.fusion_ops import ALIGNED_COLUMNS
from llm_allreduce_plugin.engines.common.fx import (
    arguments,
    depends_on,
    factors,
    has_one_element,
    is_convert,
    is_view,
    keeps_rows,
    mutated,
    mutation_of,
    operator_of,
    same_sizes,
    value,
)
from llm_allreduce_plugin.norm import QuantKind, ScaleLayout

_E4M3 = torch.float8_e4m3fn
_E4M3_MAX = 448.0
_GROUP = 128
_NVFP4_BLOCK = 16
# Below which a computed scale does not go, as engines write it. For groups vLLM has 1e-10 / 448 in its kernels, as we
# do, and the other in plain torch (docs/fused.md says what that is about).
_FLOORS = {
    QuantKind.FP8_TOKEN: (1.0 / (_E4M3_MAX * 512.0),),
    QuantKind.FP8_GROUP: (1e-10 / _E4M3_MAX, 1.0 / (_E4M3_MAX * 512.0)),
}


@dataclass(frozen=True)
class Quantization:
    """What becomes of a norm: ``quant_out`` and, where scales are computed, ``scale_out``."""

    kind: QuantKind
    quant_out: tuple[Node, ...]
    scale_out: tuple[Node, ...] = ()
    layout: str = ScaleLayout.ROWS  # or ALIGNED_COLUMNS
    scale: Node | None = None  # that is given
    inside: frozenset[Node] = field(default_factory=frozenset)


def find_quantization(norm_out: Node, all_reduce: Node) -> Quantization | None:
    """The first quantization of ``norm_out`` that a fused call can do, if there is one."""
    for source, path in _same_rows(norm_out):
        for user in source.users:
            spelling = _IN_PLACE.get(mutation_of(user))
            if spelling is None or user.kwargs["input"] is not source:
                continue
            found = spelling(user)
            if found is not None and found.quant_out and _is_free(found, all_reduce):
                return _with(found, {user, *path})
    for root in _e4m3_made_of(norm_out):
        found = _decomposed(root, norm_out)
        if found is not None and _is_free(found, all_reduce):
            return found
    return None


def _is_free(found: Quantization, all_reduce: Node) -> bool:
    """Whether a scale that is given comes from elsewhere: one made from the sum cannot be known before it."""
    if found.scale is None:
        return True
    return has_one_element(found.scale) and not depends_on((found.scale,), all_reduce)


def _with(found: Quantization, inside: set[Node]) -> Quantization:
    more = frozenset(found.inside | inside)
    return Quantization(found.kind, found.quant_out, found.scale_out, found.layout, found.scale, more)


def _same_rows(node: Node, path: tuple[Node, ...] = ()) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """``node``, and views of it with the same rows, each with the views on the way."""
    yield node, path
    for user in node.users:
        if keeps_rows(user):
            yield from _same_rows(user, (*path, user))


# -- operators in place ------------------------------------------------------------------------------------------------


def _static(node: Node) -> Quantization | None:
    given = node.kwargs
    if given.get("group_shape") not in (None, [-1, -1], (-1, -1)) or not _is_e4m3(given["result"], given["input"]):
        return None
    scale = given["scale"]
    if not isinstance(scale, Node):
        return None
    return Quantization(QuantKind.FP8, tuple(mutated(node, "result")), scale=scale, inside=_buffers(given["result"]))


def _token(node: Node) -> Quantization | None:
    given = node.kwargs
    if given.get("scale_ub") is not None or not _is_e4m3(given["result"], given["input"]):
        return None
    outputs = tuple(mutated(node, "result")), tuple(mutated(node, "scale"))
    return Quantization(QuantKind.FP8_TOKEN, *outputs, inside=_buffers(given["result"], given["scale"]))


def _group(node: Node) -> Quantization | None:
    given = node.kwargs
    if not _is_group_of_e4m3(given) or given["scale_ue8m0"]:  # powers of two as fp32: no layout of ours
        return None
    layout: str = ScaleLayout.ROWS
    if given["dummy_is_scale_transposed"]:
        layout = ALIGNED_COLUMNS if given["dummy_is_tma_aligned"] else ScaleLayout.COLUMNS
    scale = value(given["output_s"])
    if scale is None or scale.dim() != 2:  # noqa: PLR2004
        return None
    outputs = tuple(mutated(node, "output_q")), tuple(mutated(node, "output_s"))
    return Quantization(QuantKind.FP8_GROUP, *outputs, layout, inside=_buffers(given["output_q"], given["output_s"]))


def _packed_group(node: Node) -> Quantization | None:
    given = node.kwargs
    if not _is_group_of_e4m3(given):
        return None
    outputs = tuple(mutated(node, "output_q")), tuple(mutated(node, "output_s_packed"))
    return Quantization(
        QuantKind.FP8_GROUP, *outputs, ScaleLayout.UE8M0, inside=_buffers(given["output_q"], given["output_s_packed"])
    )


def _nvfp4(node: Node) -> Quantization | None:
    given = node.kwargs
    total, out = value(given["input"]), value(given["output"])
    if total is None or out is None or out.shape[-1] * 2 != total.shape[-1] or total.shape[-1] % _NVFP4_BLOCK:
        return None  # padded
    layout = ScaleLayout.SWIZZLED if given["is_sf_swizzled_layout"] else ScaleLayout.ROWS
    outputs = tuple(mutated(node, "output")), tuple(mutated(node, "output_scale"))
    inside = _buffers(given["output"], given["output_scale"])
    scale = given["input_scale"]
    if not isinstance(scale, Node):
        return None
    return Quantization(QuantKind.NVFP4, *outputs, layout, scale=scale, inside=inside)


def _is_e4m3(result: Any, source: Any) -> bool:  # noqa: ANN401
    """Whether every element of ``source`` becomes one of ``result``: nothing is padded."""
    out, given = value(result), value(source)
    return out is not None and given is not None and out.dtype == _E4M3 and same_sizes(out.shape, given.shape)


def _is_group_of_e4m3(given: Any) -> bool:  # noqa: ANN401
    limits = given["fp8_min"], given["fp8_max"]
    total = value(given["input"])
    fits = total is not None and total.shape[-1] % _GROUP == 0 and _is_e4m3(given["output_q"], given["input"])
    return fits and given["group_size"] == _GROUP and limits == (-_E4M3_MAX, _E4M3_MAX)


def _buffers(*nodes: Any) -> frozenset[Node]:  # noqa: ANN401
    names = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::permute")
    found = {node for node in nodes if operator_of(node) in names}
    return frozenset(found | {node.args[0] for node in found if operator_of(node) == "aten::permute"})


_IN_PLACE: dict[str, Callable[[Node], Quantization | None]] = {
    "_C::static_scaled_fp8_quant": _static,
    "_C::dynamic_per_token_scaled_fp8_quant": _token,
    "_C::per_token_group_fp8_quant": _group,
    "_C::per_token_group_fp8_quant_packed": _packed_group,
    "_C::scaled_fp4_quant.out": _nvfp4,
}


# -- decomposed --------------------------------------------------------------------------------------------------------

_TO_E4M3 = ("aten::mul", "aten::div", "aten::clamp", "aten::clamp_min", "aten::clamp_max")


def _e4m3_made_of(node: Node, depth: int = 8) -> Iterator[Node]:
    """Nodes that are ``node`` scaled, clamped and converted to e4m3."""
    if depth == 0:
        return
    for user in node.users:
        if is_convert(user) and user.meta["val"].dtype == _E4M3:
            yield user
        elif is_convert(user) or is_view(user) or operator_of(user) in _TO_E4M3:
            yield from _e4m3_made_of(user, depth - 1)


def _decomposed(root: Node, norm_out: Node) -> Quantization | None:
    """convert(clamp(norm / scale)): what a quantization is when it is written in plain torch."""
    inside = {root}
    quotient = _strip_clamps(root.args[0], inside)
    if operator_of(quotient) not in ("aten::mul", "aten::div"):
        return None
    inside.add(quotient)
    dividend, divisor = factors(quotient)
    if operator_of(quotient) == "aten::mul":
        if operator_of(divisor) != "aten::reciprocal":
            dividend, divisor = divisor, dividend
        if operator_of(divisor) != "aten::reciprocal":
            return None
        inside.add(divisor)
        divisor = divisor.args[0]
    if not isinstance(divisor, Node) or _strip(dividend, norm_out, inside) is not norm_out:
        return None
    scale = _strip_converts_only(divisor, inside)
    if not depends_on((scale,), norm_out):
        given = Quantization(QuantKind.FP8, (root,), scale=scale, inside=frozenset(inside))
        return given if has_one_element(scale) else None
    if scale.meta["val"].dtype != torch.float32:
        return None
    floors: list[object] = []
    width = _width_of_maximum(scale, norm_out, inside, floors)
    hidden = norm_out.meta["val"].shape[-1]
    kind = {hidden: QuantKind.FP8_TOKEN, _GROUP: QuantKind.FP8_GROUP}.get(width)
    if kind is None or (hidden % _GROUP and kind == QuantKind.FP8_GROUP):
        return None
    if not all(_is_floor(floor, _FLOORS[kind]) for floor in floors):
        return None
    return Quantization(kind, (root,), (scale,), inside=frozenset(inside))


def _is_floor(given: object, known: tuple[float, ...]) -> bool:
    """Whether a scale is held at one of these values, or at one that fp32 does not tell from it."""
    return isinstance(given, float | int) and any(math.isclose(given, value, rel_tol=1e-6) for value in known)


def _width_of_maximum(scale: Node, norm_out: Node, inside: set[Node], floors: list[object]) -> int | None:
    """How many elements share a scale max(abs(norm)) / 448, where it is one; else None.

    ``floors``: gets the values below which the scale does not go.
    """
    node: Any = scale
    inside.add(node)
    while operator_of(node) == "aten::clamp_min" or (
        operator_of(node) == "aten::clamp" and arguments(node)["max"] is None
    ):
        floors.append(arguments(node)["min"])
        node = node.args[0]
        inside.add(node)
    if (operator_of(node) == "aten::div" and node.args[1] == _E4M3_MAX) or (
        operator_of(node) == "aten::mul" and node.args[1] == 1.0 / _E4M3_MAX
    ):
        node = node.args[0]
    else:
        return None
    while is_convert(node) or is_view(node) or operator_of(node) in ("aten::unsqueeze", "aten::squeeze"):
        inside.add(node)
        node = node.args[0]
    if isinstance(node, Node) and operator_of(node.args[0]) == "aten::max" and node.args[1] == 0:
        inside.add(node)
        node = node.args[0]
    if operator_of(node) not in ("aten::max", "aten::amax") or len(node.args) < 2:  # noqa: PLR2004
        return None
    magnitude = node.args[0]
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    if operator_of(magnitude) != "aten::abs" or list(dims) not in ([-1], [magnitude.meta["val"].dim() - 1]):
        return None
    inside |= {node, magnitude}
    if _strip(magnitude.args[0], norm_out, inside) is not norm_out:
        return None
    width = magnitude.meta["val"].shape[-1]
    return width if isinstance(width, int) else None


def _strip_clamps(node: Any, inside: set[Node]) -> Any:  # noqa: ANN401
    """What is clamped to what e4m3 has; ``node`` itself where it is clamped to something else, or not."""
    low = high = False
    start = node
    passed = set()
    while operator_of(node) in ("aten::clamp", "aten::clamp_min", "aten::clamp_max"):
        given = arguments(node)
        low |= given.get("min") == -_E4M3_MAX
        high |= given.get("max") == _E4M3_MAX
        if given.get("min") not in (None, -_E4M3_MAX) or given.get("max") not in (None, _E4M3_MAX):
            return start
        passed.add(node)
        node = node.args[0]
    if not (low and high):
        return start
    inside |= passed
    return node


def _strip(node: Any, norm_out: Node, inside: set[Node]) -> Any:  # noqa: ANN401
    """What ``node`` is made from by conversions and views, as far as ``norm_out``, which may be a conversion itself."""
    while node is not norm_out and (is_convert(node) or is_view(node)):
        inside.add(node)
        node = node.args[0]
    return node


def _strip_converts_only(node: Any, inside: set[Node]) -> Any:  # noqa: ANN401
    while is_convert(node):
        inside.add(node)
        node = node.args[0]
    return node
