"""Our pass among vLLM's: layer boundaries of compiled graphs become one call each."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

from torch.fx import Graph, Node

from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.engines.common import fusion, fusion_norms, fusion_ops, fusion_quants, fx
from llm_allreduce_plugin.engines.vllm.plugin import left_alone, stock_pass_manager_path
from llm_allreduce_plugin.engines.vllm.settings import settings_of, unfused

logger = logging.getLogger("llm_allreduce_plugin")

_OPERATOR = "vllm::all_reduce"
# Passes that come before ours: what they leave is what it knows.
_BEFORE = ("NoOpEliminationPass", "AddRMSNormFusionPass")


def is_all_reduce(node: Node) -> bool:
    """Whether a node is vLLM's all-reduce of a group whose boundaries a communicator of ours fuses."""
    return fx.operator_of(node) == _OPERATOR and fusion_ops.fuses(fx.arguments(node)["group_name"])


def make_pass_manager() -> Any:  # noqa: ANN401
    """What vLLM calls for every model that it compiles, in the place of its pass manager's class."""
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return _pass_manager_class(resolve_obj_by_qualname(stock_pass_manager_path(type(current_platform))))()


@functools.cache
def _pass_manager_class(stock: type) -> type:
    """The subclass for one stock class: vLLM has no hook for a pass among its own."""

    class FusingPassManager(stock):  # type: ignore[misc]
        """``stock`` with our pass before vLLM's own that look for norms."""

        def configure(self, config: Any) -> None:  # noqa: ANN401
            super().configure(config)
            if fuses(config):
                names = [type(pass_).__name__ for pass_ in self.passes]
                place = max((names.index(name) + 1 for name in _BEFORE if name in names), default=0)
                self.passes.insert(place, _pass_class()(config))

    FusingPassManager.__qualname__ = f"FusingPassManager[{stock.__name__}]"
    return FusingPassManager


def fuses(config: Any) -> bool:  # noqa: ANN401
    """Whether graphs that are compiled under this configuration get our pass."""
    from vllm.platforms import current_platform

    settings = settings_of(config.additional_config)
    if config.parallel_config.tensor_parallel_size == 1 or unfused(config, settings, compiled=True) is not None:
        return False
    return left_alone(current_platform, config, settings) is None


def line_of(fused: fusion.Fused) -> str:
    """What the log says of a graph that has been compiled."""
    kinds = f" ({fusion_ops.in_words(fused.boundaries)})" if fused.count else ""
    return f"all-reduce fusion: {fused.count} of {fused.all_reduces} all-reduces of a compiled graph are fused{kinds}"


class GraphsWithout:
    """Says once per model that its graphs have no all-reduce of ours, as after a change of vLLM's operator.

    vLLM compiles a model in pieces, and of those between two attentions each has one. Nobody says which piece is the
    last, so the first few are looked at.
    """

    _ENOUGH = 3  # the first one may end before any sum

    def __init__(self) -> None:
        self._without: int | None = 0  # None: it is settled

    def count(self, all_reduces: int) -> None:
        """Note a graph, and how many all-reduces it has of groups that fuse."""
        if self._without is None:
            return
        self._without = None if all_reduces else self._without + 1
        if self._without == self._ENOUGH:
            self._without = None
            if fusion_ops.tells_any():
                logger.warning(
                    "all-reduce fusion: the first %d compiled graphs of this model have no all-reduce of a group of "
                    "this plugin (operator %s), so nothing was fused in them; set fuse_norm to false to "
                    "have vLLM's own fusion",
                    self._ENOUGH,
                    _OPERATOR,
                )


@functools.cache
def _pass_class() -> type:
    from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass

    class AllReduceNormFusionPass(VllmInductorPass):  # type: ignore[misc]
        """Fuses all-reduce, residual, RMSNorm and quantization."""

        def __init__(self, config: Any) -> None:  # noqa: ANN401
            super().__init__(config)
            self._graphs = GraphsWithout()

        @VllmInductorPass.time_and_log  # type: ignore[untyped-decorator]
        def __call__(self, graph: Graph) -> None:
            groups = {fx.arguments(node)["group_name"] for node in graph.nodes if is_all_reduce(node)}
            fused = fusion.fuse(graph, is_all_reduce)
            self.matched_count = fused.count
            if any(map(fusion_ops.tells, groups)):
                logger.info("%s", line_of(fused))
            self._graphs.count(fused.all_reduces)

        def uuid(self) -> str:
            """What compiled graphs depend on: our version, how graphs are searched, and groups that do not fuse."""
            modules = (fusion, fusion_norms, fusion_ops, fusion_quants, fx)
            said = __version__, *fusion_ops.unfused_groups()
            return str(VllmInductorPass.hash_source(*said, *map(inspect.getsource, modules)))

    return AllReduceNormFusionPass
