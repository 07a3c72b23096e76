"""RMSNorms of an all-reduced sum in an engine's graph, in every spelling that engines have for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from llm_allreduce_plugin.engines.common.fx import (
    arguments,
    depends_on,
    factors,
    is_convert,
    keeps_rows,
    mutated,
    mutation_of,
    needed_beside,
    operator_of,
    results,
    same_sizes,
    value,
)

IsAllReduce = Callable[[Node], bool]

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_UNIT = 8  # elements: what hidden sizes are multiples of


@dataclass(frozen=True)
class Norm:
    """``norm_out`` is the RMSNorm of ``residual_out``, the sum of ``all_reduce`` and ``residual``."""

    all_reduce: Node
    residual: Node | None
    weight: Node
    weight_bias: float
    eps: float
    norm_out: tuple[Node, ...]
    residual_out: tuple[Node, ...]  # without a residual: the all-reduce itself
    inside: frozenset[Node]  # what is of no use to anyone else


@dataclass
class _Normed:
    """What a spelling says, before anything is checked: the norm of ``x``, after ``residual`` was added."""

    x: Any
    weight: Any
    eps: Any
    norm_out: list[Node]
    inside: set[Node] = field(default_factory=set)
    residual: Any = None
    residual_out: list[Node] = field(default_factory=list)


def find_norm(node: Node, is_all_reduce: IsAllReduce) -> Norm | None:
    """The norm that ``node`` is the operator of (of a decomposed one: the inverse root), if it norms an all-reduce."""
    spelling = _SPELLINGS.get(mutation_of(node) or operator_of(node))
    normed = spelling(node) if spelling is not None else None
    if normed is None:
        return None
    normed.inside.add(node)
    all_reduce = _sum_of(normed, is_all_reduce)
    if all_reduce is None or not normed.norm_out:
        return None
    weight, bias = _weight_of(normed)
    if not _fits(normed, all_reduce, weight):
        return None
    if normed.residual is None:
        normed.residual_out = [all_reduce]
    elif needed_beside(all_reduce, {*normed.norm_out, *normed.residual_out}, normed.inside):
        return None  # somebody wants the sum itself, which a fused call does not give
    if depends_on((normed.residual, weight), all_reduce):
        return None
    return Norm(
        all_reduce, normed.residual, weight, bias, float(normed.eps),
        tuple(normed.norm_out), tuple(normed.residual_out), frozenset(normed.inside),
    )  # fmt: skip


def _fits(normed: _Normed, all_reduce: Node, weight: object) -> bool:
    """Whether shapes and types are such as a fused call takes."""
    total, out = value(all_reduce), value(normed.norm_out[0])
    weights, residual = value(weight), value(normed.residual)
    if total is None or out is None or weights is None or not isinstance(normed.eps, float | int):
        return False
    hidden = total.shape[-1]
    if total.dtype not in _TYPES or not isinstance(hidden, int) or hidden % _UNIT:
        return False
    if out.dtype != total.dtype or weights.dtype != total.dtype or tuple(weights.shape) != (hidden,):
        return False
    if out.shape[-1] != hidden:
        return False
    if normed.residual is None:
        return True
    return residual is not None and residual.dtype == total.dtype and same_sizes(residual.shape, out.shape)


# -- what is normed ----------------------------------------------------------------------------------------------------


def _strip(node: Any, inside: set[Node], *, views: bool = True) -> Any:  # noqa: ANN401
    """What ``node`` is made from by conversions, and views that keep rows."""
    while is_convert(node) or (views and keeps_rows(node)):
        inside.add(node)
        node = node.args[0]
    return node


def _sum_of(normed: _Normed, is_all_reduce: IsAllReduce) -> Node | None:
    """The all-reduce whose sum is normed. A residual that is added apart from the norm is noted in ``normed``."""
    source = _strip(normed.x, normed.inside)
    if not isinstance(source, Node):
        return None
    if is_all_reduce(source):
        return source
    if normed.residual is not None or operator_of(source) != "aten::add" or arguments(source).get("alpha", 1) != 1:
        return None
    for one, other in (factors(source), factors(source)[::-1]):
        converted: set[Node] = set()
        all_reduce = _strip(one, converted)
        if not isinstance(all_reduce, Node) or not is_all_reduce(all_reduce) or not isinstance(other, Node):
            continue
        dtype = all_reduce.meta["val"].dtype
        # A conversion for the addition is none that a fused call needs.
        normed.residual = other if other.meta["val"].dtype == dtype else _strip(other, converted, views=False)
        normed.inside |= {source, *converted}
        sums = [source, *(user for user in source.users if is_convert(user))]
        normed.residual_out = [node for node in sums if node.meta["val"].dtype == dtype]
        return all_reduce
    return None


def _weight_of(normed: _Normed) -> tuple[Any, float]:
    """The weight as the model has it, and what is added to it (Gemma: 1)."""
    weight, bias = _strip(normed.weight, normed.inside, views=False), 0.0
    if operator_of(weight) == "aten::add" and isinstance(weight.args[1], float | int):
        if arguments(weight).get("alpha", 1) != 1:
            return None, bias
        normed.inside.add(weight)
        bias = float(weight.args[1])
        weight = _strip(weight.args[0], normed.inside, views=False)
    return weight, bias


# -- spellings ---------------------------------------------------------------------------------------------------------


def _ir_norm(node: Node) -> _Normed | None:
    given = arguments(node)
    if given["variance_size"] is not None:
        return None
    return _Normed(given["x"], given["weight"], given["epsilon"], [node])


def _ir_add_norm(node: Node) -> _Normed | None:
    given = arguments(node)
    if given["variance_size"] is not None:
        return None
    return _Normed(
        given["x"], given["weight"], given["epsilon"], results(node, 0),
        residual=given["x_residual"], residual_out=results(node, 1),
    )  # fmt: skip


def _custom_norm(node: Node) -> _Normed:
    given = node.kwargs
    inside = _buffers(given["result"])
    return _Normed(given["input"], given["weight"], given["epsilon"], mutated(node, "result"), inside)


def _custom_add_norm(node: Node) -> _Normed:
    given = node.kwargs
    return _Normed(
        given["input"], given["weight"], given["epsilon"], mutated(node, "input"),
        residual=given["residual"], residual_out=mutated(node, "residual"),
    )  # fmt: skip


def _buffers(*nodes: Any) -> set[Node]:  # noqa: ANN401
    return {node for node in nodes if operator_of(node) in ("aten::empty", "aten::empty_like", "aten::empty_strided")}


def _decomposed(root: Node) -> _Normed | None:
    """X * rsqrt(mean(x * x) + eps), conversions, times a weight: what a norm is when it is written in plain torch."""
    inside: set[Node] = set()
    plus = root.args[0]
    if operator_of(plus) != "aten::add" or not isinstance(plus.args[1], float | int):  # type: ignore[union-attr]
        return None
    mean, eps = factors(plus)  # type: ignore[arg-type]
    if operator_of(mean) != "aten::mean" or not _is_last_dim(mean):
        return None
    square = mean.args[0]
    x = _squared(square)
    if x is None:
        return None
    inside |= {root, plus, mean, square}  # type: ignore[arg-type]
    scaled = _only_user(root)
    if operator_of(scaled) != "aten::mul" or scaled is None or x not in factors(scaled):
        return None
    inside.add(scaled)
    out = _after_converts(scaled, inside)
    times = _only_user(out)
    if times is None or operator_of(times) != "aten::mul":
        return None
    weight = next((other for other in factors(times) if other is not out), None)
    inside.add(times)
    last, user = times, _only_user(times)
    if times.meta["val"].dtype == torch.float32 and user is not None and is_convert(user):
        last = user  # back in the model's type
    return _Normed(x, weight, eps, [last], inside)


def _squared(node: Any) -> Any:  # noqa: ANN401
    if operator_of(node) == "aten::pow" and node.args[1] == 2:  # noqa: PLR2004
        return node.args[0]
    if operator_of(node) == "aten::mul" and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _is_last_dim(mean: Node) -> bool:
    given = arguments(mean)
    total = value(mean.args[0])
    return bool(given.get("keepdim")) and total is not None and list(given["dim"]) in ([-1], [total.dim() - 1])


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _after_converts(node: Node, inside: set[Node]) -> Node:
    while (user := _only_user(node)) is not None and is_convert(user):
        inside.add(user)
        node = user
    return node


_SPELLINGS: dict[str, Callable[[Node], _Normed | None]] = {
    "vllm_ir::rms_norm": _ir_norm,
    "vllm_ir::fused_add_rms_norm": _ir_add_norm,
    "_C::rms_norm": _custom_norm,
    "_C::fused_add_rms_norm": _custom_add_norm,
    "aten::rsqrt": _decomposed,
}
