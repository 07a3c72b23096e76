"""Layer boundaries as engines write them, fused by our pass: ``python -m tests.support.fusion_cases`` runs them all.

In a process of its own, so that it can be any version of vLLM: the one that is found first. Prints JSON: of every case,
its fault, or null.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tests.support import fusion_ops as operators

operators.define()  # before vLLM looks what there is

import vllm.platforms  # noqa: E402

if vllm.platforms.current_platform.is_unspecified():  # 0.26 knows its CPU platform by the name of its CPU build
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()

from vllm import _custom_ops, ir  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils import fp8_utils  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from llm_allreduce_plugin.engines.common import fusion, fusion_ops  # noqa: E402
from llm_allreduce_plugin.engines.vllm.fusion import is_all_reduce  # noqa: E402
from llm_allreduce_plugin.norm import Normed, Quant, QuantKind, ScaleLayout  # noqa: E402
from llm_allreduce_plugin.oracle.norm import residual_rms_norm  # noqa: E402
from tests.support.post_grad import traced  # noqa: E402

EPS = 3e-6  # none of the usual ones
GROUP = "tp:0"
Output = Any


class TwoRanks:
    """A communicator of two ranks that always have the same to add, and vLLM's group of them."""

    rank = 0

    def all_reduce_residual_rms_norm(
        self,
        input_: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_bias: float = 0.0,
        quant: Quant | None = None,
        return_norm: bool = False,
    ) -> Normed:
        return residual_rms_norm(
            input_ + input_, residual, weight, eps, weight_bias=weight_bias, quant=quant, return_norm=return_norm
        )

    def _all_reduce_out_place(self, input_: torch.Tensor) -> torch.Tensor:
        return input_ + input_


RANKS = TwoRanks()


def all_reduce(x: torch.Tensor, group: str = GROUP) -> torch.Tensor:
    return torch.ops.vllm.all_reduce(x, group)  # type: ignore[no-any-return]


# -- norms: (x, weight, residual or None) -> norm, residual_out --------------------------------------------------------

Norm = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], tuple[torch.Tensor, torch.Tensor]]


def layer(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    if residual is None:
        return ir.ops.rms_norm(x, weight, EPS), x
    return ir.ops.fused_add_rms_norm(x, residual, weight, EPS)


def gemma_layer(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    return layer(x, weight.float() + 1.0, residual)


def native(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    """What vLLM's own operators are made of, where they are not kept whole."""
    if residual is None:
        return ir.ops.rms_norm.impls["native"].impl_fn(x, weight, EPS, None), x
    return ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, EPS, None)


def native_gemma(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    return native(x, weight.float() + 1.0, residual)


def custom(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    if residual is None:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, EPS)
        return out, x
    torch.ops._C.fused_add_rms_norm(x, residual, weight, EPS)
    return x, residual


def transformers(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> Any:
    """As Hugging Face's LlamaRMSNorm does it, the residual added before."""
    total = x if residual is None else residual + x
    wide = total.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(total.dtype), total


NORMS: dict[str, Norm] = {f.__name__: f for f in (layer, gemma_layer, native, native_gemma, custom, transformers)}
BIASED = ("gemma_layer", "native_gemma")


# -- quantizations: (norm, scale) -> quant_out, scale_out or None ------------------------------------------------------


class _OnGpus:
    """While inside, vLLM's layers take the operators that they take on GPUs."""

    def __enter__(self) -> None:
        platform = type(current_platform)
        self.had = platform.__dict__.get("is_cuda_alike")
        platform.is_cuda_alike = lambda self: True

    def __exit__(self, *error: object) -> None:
        platform = type(current_platform)
        if self.had is None:
            del platform.is_cuda_alike
        else:
            platform.is_cuda_alike = self.had


def quant_layer(shape: GroupShape, *, static: bool = False, **options: Any) -> QuantFP8:
    with set_current_vllm_config(VllmConfig()):
        return QuantFP8(static, shape, compile_native=False, **options)


GROUP_128 = GroupShape(1, 128)


def _fp4(y: torch.Tensor, scale: torch.Tensor, *, swizzled: bool) -> Any:
    return _custom_ops.scaled_fp4_quant(y, scale, is_sf_swizzled_layout=swizzled)


QUANTS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], QuantKind, ScaleLayout]] = {}


def _add_quants() -> None:
    kinds, layouts = QuantKind, ScaleLayout
    for name, how, shape, kind, layout, options in (
        ("static", "cuda", GroupShape.PER_TENSOR, kinds.FP8, layouts.ROWS, {"static": True}),
        ("token", "cuda", GroupShape.PER_TOKEN, kinds.FP8_TOKEN, layouts.ROWS, {}),
        ("group", "cuda", GROUP_128, kinds.FP8_GROUP, layouts.ROWS, {"use_ue8m0": False}),
        ("group columns", "cuda", GROUP_128, kinds.FP8_GROUP, layouts.COLUMNS,
         {"use_ue8m0": False, "column_major_scales": True}),
        ("group aligned columns", "cuda", GROUP_128, kinds.FP8_GROUP, layouts.COLUMNS,
         {"use_ue8m0": False, "column_major_scales": True, "tma_aligned_scales": True}),
        ("native static", "native", GroupShape.PER_TENSOR, kinds.FP8, layouts.ROWS, {"static": True}),
        ("native token", "native", GroupShape.PER_TOKEN, kinds.FP8_TOKEN, layouts.ROWS, {}),
        ("native group", "native", GROUP_128, kinds.FP8_GROUP, layouts.ROWS, {"use_ue8m0": False}),
        ("native group columns", "native", GROUP_128, kinds.FP8_GROUP, layouts.COLUMNS,
         {"use_ue8m0": False, "column_major_scales": True}),
    ):  # fmt: skip
        forward = getattr(quant_layer(shape, **options), f"forward_{how}")  # type: ignore[arg-type]
        static = bool(options.get("static"))
        QUANTS[name] = (lambda y, s, f=forward, given=static: f(y, s) if given else f(y)), kind, layout
    packed = fp8_utils.per_token_group_quant_fp8_packed_for_deepgemm
    QUANTS["group packed"] = (lambda y, s: packed(y, 128, use_ue8m0=True)), kinds.FP8_GROUP, layouts.UE8M0
    QUANTS["nvfp4 swizzled"] = (lambda y, s: _fp4(y, s, swizzled=True)), kinds.NVFP4, layouts.SWIZZLED
    QUANTS["nvfp4 linear"] = (lambda y, s: _fp4(y, s, swizzled=False)), kinds.NVFP4, layouts.ROWS


_add_quants()


# -- cases -------------------------------------------------------------------------------------------------------------


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
        expected = self.expected(*(tensor.clone() for tensor in inputs))  # operators in place write the residual
        with _OnGpus(), torch.inference_mode():
            unfused = self.model(*(tensor.clone() for tensor in inputs))
            done, outputs, graph = run(self.model, inputs)
        kind = str(QUANTS[self.quant][1]) if self.quant else ""
        assert done == fusion.Fused(1, Counter({kind: 1})), f"{done}\n{graph}"
        assert "vllm.all_reduce" not in graph and "_C." not in graph, graph
        assert len(outputs) == len(expected), graph
        for number, (got, want, before) in enumerate(zip(outputs, expected, unfused, strict=True)):
            same(got, want, f"output {number} of\n{graph}")
            same_layout(got, before, f"output {number} of\n{graph}")
        assert ("norm_out" in fusion_ops.result_names(kind, return_norm=self.norm_too)) == (
            self.norm_too or not self.quant
        )


def make_inputs(dtype: torch.dtype, hidden: int, rows: int = 6) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x, residual = torch.randn(rows, hidden, dtype=dtype), torch.randn(rows, hidden, dtype=dtype)
    return x, residual, torch.randn(hidden, dtype=dtype), torch.tensor([0.25])


def run(model: Callable[..., Any], inputs: Any) -> tuple[fusion.Fused, list[torch.Tensor], str]:
    """What was fused, what the graph then gives, and the graph."""
    done: list[fusion.Fused] = []
    text: list[str] = []

    def pass_(graph: torch.fx.Graph) -> None:
        done.append(fusion.fuse(graph, is_all_reduce))
        text.append(str(graph))

    outputs = traced(model, inputs, pass_, 2)
    return done[0], outputs, text[0]


def same(got: torch.Tensor, want: torch.Tensor, where: str) -> None:
    """Bit for bit. Scales of NVFP4 are bytes under several names."""
    one, other = (
        torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(torch.uint8) for tensor in (got, want)
    )
    assert torch.equal(one, other), f"{got} is not {want}: {where}"


def same_layout(got: torch.Tensor, want: torch.Tensor, where: str) -> None:
    """What takes the place of a tensor must lie as that did: kernels behind it rely on it."""
    layouts = [(tensor.dtype, tuple(tensor.shape), tensor.stride()) for tensor in (got, want)]
    assert layouts[0] == layouts[1], f"{layouts[0]} is not {layouts[1]}: {where}"


# -- what must be left alone -------------------------------------------------------------------------------------------


def _sum_used(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    total = all_reduce(x)
    return (*layer(total, weight, residual), total * 3)


def _other_group(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    return layer(all_reduce(x, "ep:0"), weight, residual)


def _wide_weight(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    return layer(all_reduce(x), weight.float() * 2, residual)


def _part_of_variance(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    return ir.ops.fused_add_rms_norm(all_reduce(x), residual, weight, EPS, 64)


def _residual_of_sum(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    total = all_reduce(x)
    return layer(total, weight, residual + total.relu())


def _weighted_sum(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    return native(torch.add(residual, all_reduce(x), alpha=2), weight, None)


def _no_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    return all_reduce(x) + residual


ALONE = (
    _sum_used, _other_group, _wide_weight, _part_of_variance, _residual_of_sum, _weighted_sum, _no_norm,
)  # fmt: skip


def _normed(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return layer(all_reduce(x), weight, residual)


def _scale_of_tensor(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    wide = y.abs().max().to(torch.float32) / 448
    return total, (y.float() * wide.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn), wide


def _other_limits(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    return total, (y.float() * scale.reciprocal()).clamp(-240, 240).to(torch.float8_e4m3fn)


def _scale_of_rows(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    given = residual[:, :1].float().abs() + 1
    return total, (y.float() * given.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)


def _groups_of_64(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    return total, *fp8_utils.per_token_group_quant_fp8(y, 64, use_ue8m0=False)


def _powers_of_two(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    return total, *fp8_utils.per_token_group_quant_fp8(y, 128, use_ue8m0=True)


def _bounded_scale(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    return total, *_custom_ops.scaled_fp8_quant(y, scale_ub=scale, use_per_token_if_dynamic=True)


def _padded_rows(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
    y, total = _normed(x, residual, weight)
    return total, *_custom_ops.scaled_fp8_quant(y, scale, num_token_padding=17)


NORM_ONLY = (
    _scale_of_tensor, _other_limits, _scale_of_rows, _groups_of_64, _powers_of_two, _bounded_scale, _padded_rows,
)  # fmt: skip


def check_left_alone(model: Callable[..., Any], expected: fusion.Fused, *, hidden: int = 768) -> None:
    """What cannot be fused gives what it gave before, from operators of plain torch bit for bit."""
    inputs = make_inputs(torch.bfloat16, hidden)
    with _OnGpus(), torch.inference_mode():
        unfused = model(*(tensor.clone() for tensor in inputs))
        done, outputs, graph = run(model, inputs)
    assert done == expected, f"{done}\n{graph}"
    for got, want in zip(outputs, unfused, strict=True) if isinstance(unfused, tuple) else ((outputs, unfused),):
        same_layout(got, want, graph)
        if expected.count == 0 and "_C." not in graph:
            torch.testing.assert_close(got.float(), want.float(), rtol=0.02, atol=0.02)


def check_odd_width() -> None:
    check_left_alone(
        lambda x, residual, weight, scale: _normed(x, residual, weight), fusion.Fused(1, Counter()), hidden=12
    )


# -- whole models, and the place among vLLM's passes -------------------------------------------------------------------


def check_layers(norm: Norm) -> None:
    """Three boundaries one after the other: a first norm, one in the middle and a last one. Same values as before."""

    def model(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y, total = norm(all_reduce(x), weight, None)
        y, total = norm(all_reduce(torch.sin(y) + scale), weight, total)
        return norm(all_reduce(torch.sin(y) * residual), weight, total)[0]

    inputs = make_inputs(torch.float32, 64)
    with torch.inference_mode():
        before = model(*inputs)
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


def _passes(tp: int = 2, **settings: Any) -> list[str]:
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.config import CompilationConfig, CompilationMode, ParallelConfig
    from vllm.config.utils import Range
    from vllm.utils.import_utils import resolve_obj_by_qualname

    config = VllmConfig(
        compilation_config=CompilationConfig(custom_ops=["none"]), additional_config={"allreduce": settings}
    )
    config.parallel_config = ParallelConfig(tensor_parallel_size=tp)
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.pass_config.eliminate_noops = True
    manager = resolve_obj_by_qualname(current_platform.get_pass_manager_cls())()
    manager.configure(config)
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


def all_checks() -> dict[str, Callable[[], None]]:
    cases = [Case(norm, place) for norm in NORMS for place in ("first", "middle", "last")]
    cases += [Case(norm, place, dtype=torch.float32) for norm in NORMS for place in ("first", "middle")]
    cases += [Case("layer", place, quant) for quant in QUANTS for place in ("first", "middle")]
    cases += [Case(norm, "middle", "static") for norm in NORMS if norm != "layer"]
    cases += [Case("native", "last", quant) for quant in ("token", "native group")]
    cases += [Case("layer", "middle", quant, norm_too=True) for quant in QUANTS]
    checks: dict[str, Callable[[], None]] = {case.name: case.check for case in cases}
    alone = partial(check_left_alone, expected=fusion.Fused(1, Counter()))
    checks |= {f"left alone: {model.__name__}": partial(alone, model) for model in ALONE if model is not _other_group}
    checks["left alone: _other_group"] = partial(check_left_alone, _other_group, fusion.Fused(0, Counter()))
    checks["left alone: odd width"] = check_odd_width
    norm_only = fusion.Fused(1, Counter({"": 1}))
    checks |= {f"norm only: {model.__name__}": partial(check_left_alone, model, norm_only) for model in NORM_ONLY}
    checks |= {f"layers: {norm}": partial(check_layers, NORMS[norm]) for norm in ("layer", "native", "transformers")}
    return checks | {"batch dimension": check_batch_dimension, "pass manager": check_pass_manager}


def main() -> int:
    fusion_ops.register_operator()
    parallel_state._groups[GROUP] = parallel_state._groups["ep:0"] = lambda: RANKS  # type: ignore[assignment,return-value]
    fusion_ops.serve(GROUP, RANKS)  # type: ignore[arg-type]
    wanted = sys.argv[1:]
    faults: dict[str, str | None] = {}
    for name, check in all_checks().items():
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
