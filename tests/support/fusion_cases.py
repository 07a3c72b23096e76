"""Layer boundaries as engines write them, fused by our pass: ``python -m tests.support.fusion_cases`` runs them all.

In a process of its own, so that it can be any version of vLLM: the one that is found first. Prints JSON: of every case, its
fault, or null.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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
        return residual_rms_norm(input_ + input_, residual, weight, eps, weight_bias, quant, return_norm)

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


def all_cases() -> list[Case]:
    cases = [Case(norm, place) for norm in NORMS for place in ("first", "middle", "last")]
    cases += [Case(norm, place, dtype=torch.float32) for norm in NORMS for place in ("first", "middle")]
    cases += [Case("layer", place, quant) for quant in QUANTS for place in ("first", "middle")]
    cases += [Case(norm, "middle", "static") for norm in NORMS if norm != "layer"]
    cases += [Case("native", "last", quant) for quant in ("token", "native group")]
    cases += [Case("layer", "middle", quant, norm_too=True) for quant in QUANTS]
    return cases


def main() -> int:
    fusion_ops.register_operator()
    parallel_state._groups[GROUP] = parallel_state._groups["ep:0"] = lambda: RANKS  # type: ignore[assignment,return-value]
    fusion_ops.serve(GROUP, RANKS)  # type: ignore[arg-type]
    wanted = sys.argv[1:]
    faults: dict[str, str | None] = {}
    for case in all_cases():
        if wanted and not any(part in case.name for part in wanted):
            continue
        try:
            case.check()
        except Exception:
            faults[case.name] = traceback.format_exc()
        else:
            faults[case.name] = None
    print(json.dumps(faults))
    return 0


if __name__ == "__main__":
    sys.exit(main())
