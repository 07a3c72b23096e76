"""Layer boundaries as engines write them, fused by our pass: ``python -m tests.support.fusion_cases`` runs them all.

In a process of its own, so that it can be any version of vLLM: the one that is found first. Prints JSON: of every case,
its fault, or null. ``few`` as the first word: see :func:`all_checks`; further words: cases that have one in their name.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llm_allreduce_plugin.engines.common import fusion, fusion_ops
from llm_allreduce_plugin.norm import Quant, QuantKind
from tests.support.fusion_spellings import (  # first: it sets up vLLM
    BIASED,
    EPS,
    NORMS,
    OWN,
    QUANTS,
    OnGpus,
    all_reduce,
    current_platform,
    transformers,
)

from tests.support.fusion_runs import RANKS, Output, functional_pass, make_inputs, run, same, same_layout, serve_groups  # isort: skip
from tests.support.post_grad import traced  # isort: skip
from tests.support.fusion_refusals import ALONE, NORM_ONLY, check_left_alone, check_odd_width, other_group  # isort: skip

ONLY_FEW = "few"
FEW = ("RMSNorm", "native")


@dataclass(frozen=True)
class Case:
    """A boundary: which place it has in a model, how it is written, and who asks for the norm beside a quantization."""

    norm: str
    place: str  # first: no residual; middle; last: nobody asks for the residual
    quant: str = ""
    norm_too: bool = False
    dtype: torch.dtype = torch.bfloat16
    hidden: int = 768

    @property
    def name(self) -> str:
        parts = [self.norm, self.place, self.quant, "and norm" * self.norm_too, str(self.dtype).removeprefix("torch.")]
        return ", ".join(filter(None, parts))

    def model(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> list[Output]:
        torch._check(residual.shape[0] == x.shape[0])
        y, total = NORMS[self.norm](all_reduce(x), weight, None if self.place == "first" else residual)
        outputs = [] if self.place == "last" else [total]
        if self.quant:
            outputs += QUANTS[self.quant][0](y, scale)
        return [*outputs, y * 2] if self.norm_too or not self.quant else outputs

    def expected(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
    ) -> list[Output]:
        """The same of one fused call."""
        quant = None
        if self.quant:
            _, kind, layout = QUANTS[self.quant]
            quant = Quant(kind, scale if kind in (QuantKind.FP8, QuantKind.NVFP4) else None, layout)
        got = RANKS.all_reduce_residual_rms_norm(
            x, None if self.place == "first" else residual, weight, EPS,
            weight_bias=float(self.norm in BIASED), quant=quant, return_norm=True,
        )  # fmt: skip
        outputs = [] if self.place == "last" else [got.residual_out]
        if self.quant:
            outputs += [got.quant_out, scale if got.scale_out is None else got.scale_out]
        return [*outputs, got.norm_out * 2] if self.norm_too or not self.quant else outputs

    def check(self) -> None:
        inputs = make_inputs(self.dtype, self.hidden)
        load(self.norm, inputs)
        expected = self.expected(*(tensor.clone() for tensor in inputs))  # operators in place write the residual
        with OnGpus(), torch.inference_mode():
            unfused = self.model(*(tensor.clone() for tensor in inputs))
            done, outputs, graph = run(self.model, inputs)
        kind = str(QUANTS[self.quant][1]) if self.quant else ""
        assert done == fusion.Fused(1, Counter({kind: 1})), f"{done}\n{graph}"
        in_place = {"fused_add_rms_norm": 1} if self.norm == "RMSNorm" and self.place != "first" else {}
        assert functional_pass().functionalized_ops == in_place, "what vLLM's layer calls before grad"
        assert "vllm.all_reduce" not in graph and "_C." not in graph, graph
        assert len(outputs) == len(expected), graph
        for number, (got, want, before) in enumerate(zip(outputs, expected, unfused, strict=True)):
            same(got, want, f"output {number} of\n{graph}")
            same_layout(got, before, f"output {number} of\n{graph}")
        assert ("norm_out" in fusion_ops.result_names(kind, return_norm=self.norm_too)) == (
            self.norm_too or not self.quant
        )


def load(norm: str, inputs: tuple[torch.Tensor, ...]) -> None:
    """A layer of vLLM has its weight before it is called."""
    if norm in OWN:
        OWN[norm].load(inputs[2])


# -- whole models, and the place among vLLM's passes -------------------------------------------------------------------


def check_layers(name: str) -> None:
    """Three boundaries one after the other: a first norm, one in the middle and a last one. Same values as before."""
    norm = NORMS[name]

    def model(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y, total = norm(all_reduce(x), weight, None)
        y, total = norm(all_reduce(torch.sin(y) + scale), weight, total)
        return norm(all_reduce(torch.sin(y) * residual), weight, total)[0]

    inputs = make_inputs(torch.float32, 64)
    load(name, inputs)
    with torch.inference_mode():
        before = model(*(tensor.clone() for tensor in inputs))
        done, after, graph = run(model, inputs)
    assert done == fusion.Fused(3, Counter({"": 3})), graph
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def check_batch_dimension() -> None:
    """Hugging Face's models under vLLM have rows [1, tokens, hidden], and their linear layers [tokens, hidden]."""

    def model(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
        return transformers(all_reduce(x).view(1, -1, 64), weight, residual.unsqueeze(0))

    inputs = make_inputs(torch.bfloat16, 64)
    with torch.inference_mode():
        before = model(*inputs)
        done, after, graph = run(model, inputs)
    assert done == fusion.Fused(1, Counter({"": 1})), graph
    for got, want in zip(after, before, strict=True):
        same_layout(got, want, graph)
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def _manager(config: Any) -> Any:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    manager = resolve_obj_by_qualname(current_platform.get_pass_manager_cls())()
    manager.configure(config)
    return manager


def _config(tp: int = 2, **settings: Any) -> Any:
    from vllm.config import CompilationConfig, CompilationMode, ParallelConfig, VllmConfig

    config = VllmConfig(
        compilation_config=CompilationConfig(custom_ops=["none"]), additional_config={"allreduce": settings}
    )
    config.parallel_config = ParallelConfig(tensor_parallel_size=tp)
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.pass_config.eliminate_noops = True
    return config


def _passes(tp: int = 2, **settings: Any) -> list[str]:
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.config.utils import Range

    manager = _manager(_config(tp, **settings))
    with pass_context(Range(1, 8)):
        assert manager.uuid() == manager.uuid()
    return [type(pass_).__name__ for pass_ in manager.passes]


def check_pass_manager() -> None:
    from llm_allreduce_plugin.engines.vllm import register

    register()
    stock = ["NoOpEliminationPass"]
    assert _passes() == [*stock, "AllReduceNormFusionPass"]
    assert _passes(fuse_norm=False) == stock
    assert _passes(tp=1) == stock
    assert _passes(allreduce_strategy="NCCL") == stock


def check_compile_ranges() -> None:
    """The graph of every range of tokens is searched, by the same passes, and rank 0 says what each has."""
    from vllm.compilation.passes.inductor_pass import pass_context

    from llm_allreduce_plugin.engines.vllm import register

    register()
    config = _config()
    config.compilation_config.compile_ranges_endpoints = [8, 512]  # of compile_ranges_split_points [8]
    ranges = config.compilation_config.get_compile_ranges()
    assert len(ranges) == 2, ranges
    manager = _manager(config)
    (ours,) = (pass_ for pass_ in manager.passes if type(pass_).__name__ == "AllReduceNormFusionPass")
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    def model(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
        y, total = NORMS["layer"](all_reduce(x), weight, residual)
        y, total = NORMS["layer"](all_reduce(torch.sin(y) + scale), weight, total)
        return y, total, all_reduce(torch.cos(y))

    def compile_ranges() -> None:
        for range_ in ranges:
            assert ours.is_applicable_for_range(range_), range_

            def passes(graph: torch.fx.Graph, range_: Any = range_) -> None:
                with pass_context(range_):
                    for pass_ in manager.passes:
                        if pass_.is_applicable_for_range(range_):
                            pass_(graph)

            ours.matched_count = 0
            traced(model, make_inputs(torch.float32, 64), passes, 2)
            assert ours.matched_count == 2, range_

    logger, handler = logging.getLogger("llm_allreduce_plugin"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        compile_ranges()
        first, lines[:] = list(lines), []
        RANKS.rank = 1
        serve_groups()
        compile_ranges()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        RANKS.rank = 0
        serve_groups()
    line = "all-reduce fusion: 2 of 3 all-reduces of a compiled graph are fused (2 with RMSNorm)"
    assert [found for found in first if "of a compiled graph" in found] == [line, line], first
    assert not [found for found in lines if "of a compiled graph" in found], "of another rank than the first"


def all_checks(*, few: bool) -> dict[str, Callable[[], None]]:
    """The checks by name. ``few``: types and quantizations with two norms alone, vLLM's and one in plain torch.

    Norms and quantizations are found one after the other, so of a further version of vLLM these show what differs.
    """
    cases = [Case(norm, place) for norm in NORMS for place in ("first", "middle", "last")]
    typed = FEW if few else NORMS
    cases += [Case(norm, place, dtype=torch.float32) for norm in typed for place in ("first", "middle")]
    cases += [Case(norm, "middle", dtype=torch.float16) for norm in typed]
    # ``layer`` and ``gemma_layer`` leave what vLLM's layers leave, of which each quantization is tried.
    crossed = [norm for norm in typed if norm not in {"layer", "gemma_layer"}]
    cases += [Case(norm, "middle", quant) for norm in crossed for quant in QUANTS]
    cases += [Case("RMSNorm", "first", quant) for quant in QUANTS]
    cases += [Case("RMSNorm", "middle", quant, norm_too=True) for quant in QUANTS]
    cases += [Case("native", "last", quant) for quant in ("token", "native group")]
    checks: dict[str, Callable[[], None]] = {case.name: case.check for case in cases}
    alone = partial(check_left_alone, expected=fusion.Fused(1, Counter()))
    checks |= {f"left alone: {model.__name__}": partial(alone, model) for model in ALONE if model is not other_group}
    checks["left alone: other_group"] = partial(check_left_alone, other_group, fusion.Fused(0, Counter()))
    checks["left alone: odd width"] = check_odd_width
    norm_only = fusion.Fused(1, Counter({"": 1}))
    checks |= {f"norm only: {model.__name__}": partial(check_left_alone, model, norm_only) for model in NORM_ONLY}
    checks |= {f"layers: {norm}": partial(check_layers, norm) for norm in (*OWN, "native", "transformers")}
    return (
        checks
        | {"batch dimension": check_batch_dimension, "pass manager": check_pass_manager}
        | {"compile ranges": check_compile_ranges}
    )


def main() -> int:
    # The collector would go through all that torch has loaded, again and again: an eighth of the time.
    gc.freeze()
    gc.disable()
    serve_groups()
    few = sys.argv[1:2] == [ONLY_FEW]
    wanted = sys.argv[1 + few :]
    faults: dict[str, str | None] = {}
    for name, check in all_checks(few=few).items():
        if wanted and not any(part in name for part in wanted):
            continue
        try:
            check()
        except Exception:
            faults[name] = traceback.format_exc()
        else:
            faults[name] = None
    sys.stdout.write(json.dumps(faults) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
