"""Small questions about FX graphs, for searching them: which operator a node calls, with what, and who needs it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

_CONVERT = "prims::convert_element_type"
_VIEWS = ("aten::view", "aten::reshape", "aten::_unsafe_view")


def operator_of(node: object) -> str:
    """The operator that a node calls, without its overload: ``"aten::mul"``. Empty: none of torch's."""
    if isinstance(node, Node) and isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001
        return str(node.target._schema.name)  # noqa: SLF001
    return ""


def arguments(node: Node) -> dict[str, Any]:
    """What a node gives its operator, by the names of the schema, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]  # noqa: SLF001
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    return defaults | given | dict(node.kwargs)


def mutation_of(node: object) -> str:
    """The operator in place whose functional form (``auto_functionalized``) a node is, with its overload; or empty."""
    if not isinstance(node, Node) or node.target is not torch.ops.higher_order.auto_functionalized:
        return ""
    schema = node.args[0]._schema  # type: ignore[union-attr]  # noqa: SLF001
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


def results(node: Node, index: int) -> list[Node]:
    """The nodes that take result ``index`` out of what ``node`` returns."""
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]


def mutated(node: Node, name: str) -> list[Node]:
    """The nodes that are argument ``name`` after the operator in place of :func:`mutation_of`."""
    schema = node.args[0]._schema  # type: ignore[union-attr]  # noqa: SLF001
    written = [argument.name for argument in schema.arguments if argument.is_write]
    # Its own results come first; one that returns nothing has one place for that.
    return results(node, max(1, len(schema.returns)) + written.index(name))


def value(node: object) -> torch.Tensor | None:
    """The fake tensor that a node stands for, if it stands for one."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def is_convert(node: object) -> bool:
    """Whether a node gives its input in another type."""
    return operator_of(node) == _CONVERT


def is_view(node: object) -> bool:
    """Whether a node gives the elements of its input in another shape."""
    return operator_of(node) in _VIEWS


def keeps_rows(node: object) -> bool:
    """Whether a node gives the rows of its input as they are: their last dimension stays."""
    if not isinstance(node, Node) or not is_view(node):
        return False
    before, after = value(node.args[0]), value(node)
    return before is not None and after is not None and before.shape[-1] == after.shape[-1]


def factors(node: Node) -> tuple[Any, Any]:
    """The two inputs of an operator of two."""
    return node.args[0], node.args[1]


def needed_beside(node: Node, replaced: Collection[Node], inside: Collection[Node]) -> bool:
    """Whether ``node`` is still needed once ``replaced`` have other values.

    Args:
        node: what may be needed.
        replaced: users that take their values from elsewhere.
        inside: users that are there only for those.
    """
    for user in node.users:
        if user in replaced:
            continue
        if user not in inside:
            if user.users or user.op == "output" or user.is_impure():
                return True
        elif needed_beside(user, replaced, inside):
            return True
    return False


def depends_on(nodes: Iterable[object], source: Node) -> bool:
    """Whether one of ``nodes`` is made from ``source``."""
    order = {node: place for place, node in enumerate(source.graph.nodes)}
    seen: set[Node] = set()
    open_ = [node for node in nodes if isinstance(node, Node)]
    while open_:
        node = open_.pop()
        if node is source:
            return True
        if node not in seen and order[node] > order[source]:
            seen.add(node)
            open_.extend(node.all_input_nodes)
    return False


def call(graph: Graph, function: Any, *args: Any) -> Node:  # noqa: ANN401
    """A new node, with the fake value that later passes look at."""
    node = graph.call_function(function, args)
    values = torch.fx.map_arg(args, lambda argument: argument.meta["val"])
    example = next((leaf for leaf in torch.utils._pytree.tree_leaves(values) if hasattr(leaf, "fake_mode")), None)  # noqa: SLF001
    if example is None:
        node.meta["val"] = function(*values)
    else:
        with example.fake_mode:
            node.meta["val"] = function(*values)
    return node


def shape_for(like: torch.Tensor) -> list[int] | None:
    """The shape of a fake tensor as a reshape may be given it; None where more than one dimension is open."""
    shape = [size if isinstance(size, int) else -1 for size in like.shape]
    return None if shape.count(-1) > 1 else shape


def erase_unused(graph: Graph, nodes: Collection[Node]) -> None:
    """Take those of ``nodes`` out of the graph that nobody needs any more."""
    for node in reversed(graph.nodes):
        if node in nodes and not node.users:
            graph.erase_node(node)


def has_one_element(node: object) -> bool:
    """Whether a node is known to be a tensor of one fp32 element, without a guard on sizes that are open."""
    found = value(node)
    return found is not None and found.dtype == torch.float32 and statically_known_true(found.numel() == 1)


def same_sizes(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are known to be the same, without a guard on sizes that are open."""
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))
