"""What ``bench --fused`` compares with, each opened against modules that stand in for its package.

They take what the packages take, by name and place, and compute in plain torch. Ranks: this one and another that has
the same input.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from llm_allreduce_plugin.bench import norm_candidates
from llm_allreduce_plugin.bench.candidates import MIB, OurSettings
from llm_allreduce_plugin.bench.norm_candidates import EPS, NormCandidate, NormCase
from llm_allreduce_plugin.measure import norm_answers
from llm_allreduce_plugin.norm import Normed, Quant, QuantKind, ScaleLayout, empty_outputs
from llm_allreduce_plugin.oracle import norm as oracle
from llm_allreduce_plugin.oracle.norm import residual_rms_norm

HIDDEN, ROWS, RANKS = 256, 5, 2
CPU = torch.device("cpu")
CONTEXT = cast(
    "Any", SimpleNamespace(world_size=RANKS, rank=0, device=torch.device("cuda", 0), group=1, control_group=2)
)
KINDS = (None, *QuantKind)


def case_of(kind: QuantKind | None, rows: int = ROWS, dtype: torch.dtype = torch.bfloat16) -> NormCase:
    input_ = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(5)).to(dtype)
    residual, weight = norm_answers.make_beside(3, rows, HIDDEN, dtype, CPU)
    return NormCase(input_, residual, weight, norm_answers.make_quant(kind, CPU))


def expected_of(case: NormCase) -> Normed:
    return norm_answers.expected(case.input * RANKS, case.residual, case.weight, EPS, case.quant)


def wrong(answer: Normed, case: NormCase) -> int:
    return norm_answers.wrong_elements(answer, expected_of(case), exact=False, world_size=RANKS, quant=case.quant)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """A module of that name and, where they are not there, the packages that it is in."""
    parent = ""
    for part in name.split("."):
        parent = f"{parent}.{part}" if parent else part
        if parent != name and parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    module = ModuleType(name)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)
    above, _, last = name.rpartition(".")
    if above:
        monkeypatch.setattr(sys.modules[above], last, module, raising=False)
    return module


def open_(name: str) -> NormCandidate:
    return norm_candidates._GPU[name](CONTEXT, OurSettings(), HIDDEN)


# -- vLLM --------------------------------------------------------------------------------------------------------------


def quantized(norm: torch.Tensor, quant: Quant) -> Normed:
    """Rows that are normed already."""
    out = empty_outputs(norm, quant, return_norm=False)
    oracle._quantize(norm.float(), quant, out)
    return out


class Vllm:
    """Of its operators and functions, those that a version has; what they were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, without: tuple[str, ...] = (), capability: int = 10) -> None:
        self.asked: list[Any] = []
        compiled = {
            "fused_add_rms_norm": self.norm,
            "fused_add_rms_norm_static_fp8_quant": self.static,
            "per_token_group_fp8_quant": None,
            "scaled_fp4_quant": None,
        }
        functions = {
            "fused_add_rms_norm": self.norm,
            "rms_norm_dynamic_per_token_quant": self.token,
            "scaled_fp4_quant": self.fp4,
        }
        groups = {"per_token_group_quant_fp8": self.group}
        for members in (compiled, functions, groups):
            for name in without:
                members.pop(name, None)
        monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(**compiled), raising=False)
        for package in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, package)
        install(monkeypatch, "vllm._custom_ops", **functions)
        install(monkeypatch, "vllm.model_executor.layers.quantization.utils.fp8_utils", **groups)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (capability, 0))
        monkeypatch.setattr(norm_candidates.dist, "all_reduce", self.all_reduce)

    def all_reduce(self, tensor: torch.Tensor, *, group: Any) -> None:
        assert group == CONTEXT.group
        tensor.mul_(RANKS)

    @staticmethod
    def norm(total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        out = residual_rms_norm(total, residual, weight, eps)
        assert out.norm_out is not None
        total.copy_(out.norm_out)
        residual.copy_(out.residual_out)

    @classmethod
    def static(
        cls, codes: torch.Tensor, total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor,
        scale: torch.Tensor, eps: float,
    ) -> None:  # fmt: skip
        cls.norm(total, residual, weight, eps)
        made = quantized(total, Quant(QuantKind.FP8, scale)).quant_out
        assert made is not None
        codes.copy_(made)

    @classmethod
    def token(
        cls, total: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, *, residual: torch.Tensor
    ) -> tuple[Any, Any]:
        assert dtype is torch.float8_e4m3fn
        cls.norm(total, residual, weight, eps)
        made = quantized(total, Quant(QuantKind.FP8_TOKEN))
        return made.quant_out, made.scale_out

    def group(self, x: torch.Tensor, group_size: int, *, use_ue8m0: bool | None = None) -> tuple[Any, Any]:
        self.asked.append((group_size, use_ue8m0))
        made = quantized(x, Quant(QuantKind.FP8_GROUP))
        return made.quant_out, made.scale_out

    def fp4(self, x: torch.Tensor, scale: torch.Tensor, is_sf_swizzled_layout: bool = True) -> tuple[Any, Any]:
        self.asked.append(is_sf_swizzled_layout)
        layout = ScaleLayout.SWIZZLED if is_sf_swizzled_layout else ScaleLayout.ROWS
        made = quantized(x, Quant(QuantKind.NVFP4, scale, layout))
        return made.quant_out, made.scale_out


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_norms_behind_nccl(monkeypatch: pytest.MonkeyPatch, kind: QuantKind | None) -> None:
    vllm = Vllm(monkeypatch)
    candidate = open_("NCCL+vLLM-norm")
    case = case_of(kind)
    given = [tensor.clone() for tensor in (case.input, case.residual)]
    assert candidate.refusal(case) is None
    assert candidate.in_place
    answer = candidate.bind(case)()
    assert (answer.quant_out is None) == (kind is None)
    assert wrong(answer, case) == 0
    for tensor, before in zip((case.input, case.residual), given, strict=True):
        assert torch.equal(tensor, before), "copies are overwritten"
    assert vllm.asked == {QuantKind.FP8_GROUP: [(128, False)], QuantKind.NVFP4: [False]}.get(cast("Any", kind), [])


@pytest.mark.parametrize(
    ("kind", "without", "capability", "words"),
    [
        (QuantKind.FP8_GROUP, ("per_token_group_quant_fp8",), 10, "this vLLM does not quantize groups: cannot import"),
        (QuantKind.FP8_GROUP, ("per_token_group_fp8_quant",), 10, "this vLLM does not quantize groups: "),
        (QuantKind.NVFP4, ("scaled_fp4_quant",), 10, "this vLLM has no scaled_fp4_quant"),
        (QuantKind.NVFP4, (), 9, "vLLM quantizes to nvfp4 from sm_100 on"),
    ],
)
def test_what_a_vllm_lacks_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, kind: QuantKind, without: tuple[str, ...], capability: int, words: str
) -> None:
    Vllm(monkeypatch, without=without, capability=capability)
    candidate = open_("NCCL+vLLM-norm")
    assert (candidate.refusal(case_of(kind)) or "").startswith(words)
    for other in KINDS:
        if other is not kind:
            assert candidate.refusal(case_of(other)) is None
            assert wrong(candidate.bind(case_of(other))(), case_of(other)) == 0


def test_a_vllm_without_kernels_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    Vllm(monkeypatch, without=("fused_add_rms_norm",))
    with pytest.raises(RuntimeError, match="this vLLM has no compiled norm"):
        open_("NCCL+vLLM-norm")


# -- the fused kernels of others ---------------------------------------------------------------------------------------


def flashinfer(monkeypatch: pytest.MonkeyPatch, patterns: tuple[str, ...]) -> SimpleNamespace:
    """Its package; ``made``: what its workspace was asked for."""
    seen = SimpleNamespace(made={}, destroyed=0)

    def create(**wanted: Any) -> Any:
        seen.made = wanted

        def destroy() -> None:
            seen.destroyed += 1

        return SimpleNamespace(destroy=destroy)

    def run(*, input: torch.Tensor, pattern: str, **given: Any) -> None:  # noqa: A002  (its name)
        kinds = {"kARResidualRMSNormFP8Quant": QuantKind.FP8, "kARResidualRMSNormDynamicFP8Quant": QuantKind.FP8_TOKEN}
        kind = kinds.get(pattern)
        quant = None if kind is None else Quant(kind, given["scale_factor"])
        made = residual_rms_norm(input * RANKS, given["residual_in"], given["rms_gamma"], given["rms_eps"], quant=quant)
        for name, tensor in made._asdict().items():
            if tensor is not None:
                given[name].copy_(tensor)

    install(
        monkeypatch,
        "flashinfer.comm",
        AllReduceFusionPattern=SimpleNamespace(**{name: name for name in patterns}),
        create_allreduce_fusion_workspace=create,
        allreduce_fusion=run,
    )
    install(monkeypatch, "flashinfer.comm.mnnvl", TorchDistBackend=lambda *, group: ("of", group))
    return seen


OLD = ("kARResidualRMSNorm", "kARResidualRMSNormFP8Quant")


@pytest.mark.parametrize("patterns", (OLD, (*OLD, "kARResidualRMSNormDynamicFP8Quant")), ids=("old", "new"))
def test_flashinfer(monkeypatch: pytest.MonkeyPatch, patterns: tuple[str, ...]) -> None:
    seen = flashinfer(monkeypatch, patterns)
    candidate = open_("FlashInfer")
    assert seen.made["backend"] == "trtllm"
    assert (seen.made["rank"], seen.made["world_size"], seen.made["hidden_dim"]) == (0, RANKS, HIDDEN)
    assert seen.made["comm_backend"] == ("of", CONTEXT.control_group)
    known = (None, QuantKind.FP8, QuantKind.FP8_TOKEN)[: len(patterns)]
    for kind in KINDS:
        case = case_of(kind)
        refusal = candidate.refusal(case)
        assert (refusal is None) == (kind in known), refusal
        if kind in known:
            assert wrong(candidate.bind(case)(), case) == 0
    assert candidate.refusal(case_of(None, dtype=torch.float16)) == "is opened for bfloat16"
    most = 16 * MIB // (2 * HIDDEN)
    assert seen.made["max_token_num"] == most
    assert candidate.refusal(case_of(None, most + 1)) == f"takes at most {most} rows here"
    candidate.close()
    assert seen.destroyed == 1


def sglang(
    monkeypatch: pytest.MonkeyPatch, *, disabled: bool = False, sizes: tuple[int, ...] = (1, 2)
) -> SimpleNamespace:
    """Its package, on a GPU of three multiprocessors."""
    seen = SimpleNamespace(registered=None, closed=0, settings={})

    class Plane:
        def __init__(self, group: Any, device: torch.device, **settings: int) -> None:
            assert (group, device) == (CONTEXT.control_group, CONTEXT.device)
            seen.settings, self.disabled, self.obj = settings, disabled, "plane"

        def close(self) -> None:
            seen.closed += 1

    def norm(
        input_: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, world_size: int,
        residual_out: torch.Tensor,
    ) -> tuple[Any, Any]:  # fmt: skip
        assert seen.registered == "plane"
        made = residual_rms_norm(input_ * world_size, residual, weight, eps)
        return made.norm_out, residual_out.copy_(made.residual_out)

    def register(plane: str) -> None:
        seen.registered = plane

    for package in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, package)
    install(
        monkeypatch,
        "sglang.kernels.ops.communication.all_reduce_fusion",
        all_reduce_residual_norm=norm,
        register_comm=register,
        valid_cluster_sizes=lambda _hidden: sizes,
    )
    install(monkeypatch, "sglang.srt.distributed.device_communicators.custom_all_reduce_v2", CustomAllReduceV2=Plane)
    gpu = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: gpu)
    monkeypatch.setattr(norm_candidates, "sglang_world", lambda _context: contextlib.nullcontext())
    return seen


def test_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = sglang(monkeypatch)
    candidate = open_("SGLang")
    assert seen.settings["max_push_blocks"] == 3
    assert seen.settings["max_push_size"] == 3 * HIDDEN * 2
    case = case_of(None, 3)
    assert candidate.refusal(case) is None
    assert wrong(candidate.bind(case)(), case) == 0
    assert candidate.refusal(case_of(None, 4)) == "takes at most 3 rows here"
    assert candidate.refusal(case_of(None, 3, torch.float16)) == "takes bfloat16"
    for kind in QuantKind:
        assert candidate.refusal(case_of(kind, 3)) == f"is not measured with {kind}"
    candidate.close()
    assert seen.closed == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"disabled": True}, "SGLang disables it here"), ({"sizes": ()}, f"has no kernel for hidden size {HIDDEN}")],
)
def test_where_sglang_cannot(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: str) -> None:
    sglang(monkeypatch, **settings)
    with pytest.raises(RuntimeError, match=words):
        open_("SGLang")


def test_all_peers_are_here() -> None:
    """A new one wants a test of its own."""
    assert set(norm_candidates._GPU) - set(norm_candidates._OURS) == {"NCCL+vLLM-norm", "FlashInfer", "SGLang"}


# -- how answers in groups are judged ----------------------------------------------------------------------------------

Spoil = Callable[[Normed], Normed]


def turned(answer: Normed) -> Normed:
    """Every tenth row shifted by one: right scales, wrong codes."""
    assert answer.quant_out is not None
    codes = answer.quant_out.clone()
    codes[::10] = codes[::10].roll(1, -1)
    return answer._replace(quant_out=codes)


def doubled(answer: Normed) -> Normed:
    assert answer.scale_out is not None
    scales = answer.scale_out.clone()
    scales[0] = (scales[0].float() * 2).to(scales.dtype)
    return answer._replace(scale_out=scales)


@pytest.mark.parametrize("kind", (QuantKind.FP8_GROUP, QuantKind.NVFP4))
@pytest.mark.parametrize("spoil", (turned, doubled))
def test_what_is_quantized_wrongly_is_found(kind: QuantKind, spoil: Spoil) -> None:
    case = case_of(kind)
    answer = expected_of(case)
    assert wrong(answer, case) == 0
    assert wrong(spoil(answer), case) > HIDDEN // 8


@pytest.mark.parametrize("kind", (QuantKind.FP8_GROUP, QuantKind.NVFP4))
def test_what_another_rounding_gives_is_right(kind: QuantKind) -> None:
    """A norm that was rounded before its weight, as vLLM's is; most codes are the same, and some are not."""
    case = case_of(kind, 200)
    exact = expected_of(case)
    rows = exact.residual_out.float()
    inverse = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + EPS)
    norm = (rows * inverse).to(torch.bfloat16) * case.weight
    assert case.quant is not None
    made = quantized(norm, case.quant)
    answer = Normed(norm, exact.residual_out, made.quant_out, made.scale_out)
    assert made.quant_out is not None
    assert exact.quant_out is not None
    assert (made.quant_out.view(torch.uint8) != exact.quant_out.view(torch.uint8)).any()
    assert wrong(answer, case) == 0
