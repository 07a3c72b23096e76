"""All-reduces of an engine's graph, with the residual, norm and quantization behind them, become one call each."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

from llm_allreduce_plugin.engines.common import fusion_ops
from llm_allreduce_plugin.engines.common.fusion_norms import IsAllReduce, Norm, find_norm
from llm_allreduce_plugin.engines.common.fusion_quants import Quantization, find_quantization
from llm_allreduce_plugin.engines.common.fx import (
    arguments,
    call,
    erase_unused,
    needed_beside,
    same_sizes,
    shape_for,
    value,
)
from llm_allreduce_plugin.norm import QuantKind


@dataclass(frozen=True)
class Fused:
    """What was done to a graph."""

    all_reduces: int  # that were in it, of groups of ours
    boundaries: Counter[str]  # that were fused, by quantization; "": none

    @property
    def count(self) -> int:
        """How many boundaries were fused."""
        return self.boundaries.total()


def fuse(graph: Graph, is_all_reduce: IsAllReduce) -> Fused:
    """Fuse every boundary of ``graph`` that can be.

    Args:
        graph: functional, with fake values, as post-grad passes of Inductor see it. Changed in place.
        is_all_reduce: whether a node is an all-reduce ``(input, group)`` of a group that has a communicator of ours.
    """
    all_reduces = sum(map(is_all_reduce, graph.nodes))
    boundaries: Counter[str] = Counter()
    if all_reduces:
        for node in list(graph.nodes):
            norm = None if node._erased else find_norm(node, is_all_reduce)  # noqa: SLF001
            if norm is not None and (kind := _replace(graph, node, norm)) is not None:
                boundaries[kind] += 1
    if boundaries:
        stable_topological_sort(graph)  # a scale may have come after the norm
        graph.lint()
    return Fused(all_reduces, boundaries)


def _replace(graph: Graph, anchor: Node, norm: Norm) -> str | None:
    """Put one call in the place of a boundary; the quantization that it does, or None: it cannot be put there."""
    found = _quantization_of(norm)
    quantized = () if found is None else (*found.quant_out, *found.scale_out)
    inside = norm.inside | (frozenset() if found is None else found.inside)
    return_norm = found is None or any(needed_beside(node, quantized, inside) for node in norm.norm_out)
    shapes = [shape_for(node.meta["val"]) for node in (*norm.norm_out, *norm.residual_out, *quantized)]
    if None in shapes:
        return None
    with graph.inserting_before(anchor):
        results = _fused_call(graph, norm, found, return_norm=return_norm)
        replaced = {"residual_out": norm.residual_out}
        if return_norm:
            replaced["norm_out"] = norm.norm_out
        if found is not None:
            replaced |= {"quant_out": found.quant_out, "scale_out": found.scale_out}
        for name, nodes in replaced.items():
            for node in nodes:
                node.replace_all_uses_with(_like(graph, results[name], node))
    erase_unused(graph, {*inside, *norm.norm_out, *norm.residual_out, *quantized, norm.all_reduce})
    return "" if found is None else str(found.kind)


def _quantization_of(norm: Norm) -> Quantization | None:
    for node in norm.norm_out:
        if (found := find_quantization(node, norm.all_reduce)) is not None:
            # NVFP4 is made from 16-bit types; of fp32 norms the rest is left as it is.
            return found if found.kind != QuantKind.NVFP4 or node.meta["val"].dtype != torch.float32 else None
    return None


def _fused_call(graph: Graph, norm: Norm, found: Quantization | None, *, return_norm: bool) -> dict[str, Node]:
    """The call, and its results by name."""
    input_, group = norm.all_reduce.args[0], arguments(norm.all_reduce)["group_name"]
    assert isinstance(input_, Node)
    input_ = _like(graph, input_, norm.norm_out[0])
    kind, layout, scale = ("", "", None) if found is None else (str(found.kind), str(found.layout), found.scale)
    operands = (norm.residual, norm.weight, norm.eps, norm.weight_bias, kind, layout, scale, return_norm, group)
    fused = call(graph, torch.ops.llm_allreduce.all_reduce_rms_norm.default, input_, *operands)
    names = fusion_ops.result_names(kind, return_norm=return_norm)
    return {name: call(graph, operator.getitem, fused, place) for place, name in enumerate(names)}


def _like(graph: Graph, given: Node, wanted: Node) -> Node:
    """``given`` in the type and shape of ``wanted``, which has the same bytes."""
    target, shape = wanted.meta["val"], shape_for(wanted.meta["val"])
    have = value(given)
    if have is not None and have.dtype != target.dtype:
        given = call(graph, torch.ops.aten.view.dtype, given, target.dtype)
        have = value(given)
    if have is not None and same_sizes(have.shape, target.shape):
        return given
    return call(graph, torch.ops.aten.reshape.default, given, shape)
