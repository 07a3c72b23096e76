"""vLLM's own processes and groups of two: ``python -m tests.support.vllm_groups FOLDER PROFILE PART...``.

Run for any version of vLLM that PYTHONPATH has. Prints a line of JSON for each part: ``registration``, ``groups`` and
``compiled``; the last two by every rank.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.multiprocessing as mp

import vllm.platforms  # isort: skip

if vllm.platforms.current_platform.is_unspecified():  # 0.26 knows its CPU platform by the name of its CPU build
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()

# Here, before ranks are forked: once for all.
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationConfig, CompilationMode, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state as ps
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from llm_allreduce_plugin.oracle.norm import residual_rms_norm

# What is asked for, and what runs.
STRATEGIES = {"ONESHOT": "ONESHOT", "TWOSHOT": "TWOSHOT", "NCCL": "NCCL", "AUTO": "TWOSHOT", "UB": "UB"}
HIDDEN, ROWS, EPS = 512, 5, 1e-6
GEMMA = "vllm.model_executor.layers.fused_allreduce_gemma_rms_norm"
try:
    STOCK_GEMMA = importlib.import_module(GEMMA).fused_allreduce_gemma_rms_norm
except AttributeError:  # of 0.26, which cannot be imported without vLLM's own operators
    STOCK_GEMMA = None


def say(part: str, **seen: Any) -> None:
    sys.stdout.write(json.dumps({"part": part, **seen}) + "\n")
    sys.stdout.flush()


# -- one process -------------------------------------------------------------------------------------------------------


def registration() -> None:
    """Entry point found, idempotent, no CUDA; the factory replaces the path and knows the stock one."""
    load_general_plugins()
    from llm_allreduce_plugin.engines.vllm import register
    from llm_allreduce_plugin.engines.vllm.plugin import FACTORY, has_custom_all_reduce, stock_communicator_path
    from llm_allreduce_plugin.engines.vllm.settings import settings_of, stands_aside

    first = type(current_platform).get_device_communicator_cls
    register()
    register()
    assert type(current_platform).get_device_communicator_cls == first
    assert current_platform.get_device_communicator_cls() == FACTORY
    stock = stock_communicator_path(type(current_platform))

    def reason(*, disabled: bool, nodes: int = 1, **additional: Any) -> str | None:
        parallel = ParallelConfig(tensor_parallel_size=2, disable_custom_all_reduce=disabled, nnodes=nodes)
        config = VllmConfig(parallel_config=parallel, additional_config=additional)
        custom = has_custom_all_reduce(current_platform, config)
        return stands_aside(config, settings_of(config.additional_config), custom_all_reduce=custom)

    assert not has_custom_all_reduce(current_platform)
    assert ParallelConfig(tensor_parallel_size=2).disable_custom_all_reduce, "set by vLLM"
    assert reason(disabled=False) is None
    assert reason(disabled=True) is None
    type(current_platform).use_custom_allreduce = classmethod(lambda cls: True)
    assert not ParallelConfig(tensor_parallel_size=2).disable_custom_all_reduce
    assert reason(disabled=False) is None
    assert reason(disabled=True, allreduce_strategy="ONESHOT") is None
    assert reason(disabled=False, nodes=2) is None, "0.26 sets the flag itself"
    assert not torch.cuda.is_initialized()
    say("registration", version=vllm.__version__, stock=stock, reason=reason(disabled=True))


def alone() -> None:
    """A process in which this plugin is not named."""
    os.environ["VLLM_PLUGINS"] = "another"
    load_general_plugins()
    say("alone", stock=current_platform.get_device_communicator_cls())


# -- ranks -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tensor_parallel(rank: int, store: str, config: VllmConfig) -> Iterator[Any]:
    """vLLM's groups of two ranks; yields the tensor-parallel one's communicator."""
    with set_current_vllm_config(config):
        ps.init_distributed_environment(2, rank, f"file://{store}", rank, "gloo")
        ps.initialize_model_parallel(2, 1)
        yield ps.get_tp_group().device_communicator
        ps.destroy_model_parallel()
        ps.destroy_distributed_environment()


def groups(rank: int, folder: str, profile: str) -> None:
    """Of a tensor-parallel group the communicator is ours, of others vLLM's."""
    logging.basicConfig(level=logging.INFO)
    load_general_plugins()
    model = ModuleType("vllm.models.of_a_test")  # which has imported vLLM's function before
    model.__dict__["fused_allreduce_gemma_rms_norm"] = STOCK_GEMMA
    sys.modules[model.__name__] = model
    for strategy, runs in STRATEGIES.items():
        allreduce = {"allreduce_strategy": strategy, "tuning_profile": profile}
        config = VllmConfig(additional_config={"allreduce": allreduce})
        with tensor_parallel(rank, f"{folder}/store-{strategy}", config) as tp:
            assert isinstance(tp, CpuCommunicator)
            # The world group has the same ranks, and is none of our business.
            world = ps.init_model_parallel_group([[0, 1]], rank, "gloo", group_name="ep").device_communicator
            x = torch.full((3, 4), float(rank + 1))
            y = ps.get_tp_group().all_reduce(x)
            assert torch.equal(y, torch.full((3, 4), 3.0))
            if strategy != "NCCL":
                assert torch.equal(x, torch.full((3, 4), float(rank + 1))), "the input was written"
                assert tp.llm_allreduce.report()["calls"] == {runs: 1}
                if STOCK_GEMMA is not None:
                    models_that_sum_themselves(rank, tp)
                refuses_checkpoints(tp)
            say("groups", rank=rank, strategy=strategy, tp=type(tp).__qualname__, world=type(world).__qualname__)


def models_that_sum_themselves(rank: int, communicator: Any) -> None:
    """What some models call instead of an all-reduce and a norm is our fused call, in modules that had it before, too.

    FlashInfer is never asked for, whoever would.
    """
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    of_a_model = vars(sys.modules["vllm.models.of_a_test"])["fused_allreduce_gemma_rms_norm"]
    assert of_a_model is not STOCK_GEMMA
    calls: list[tuple[Any, Any, float]] = [(of_a_model, GemmaRMSNorm, 1.0)]
    with contextlib.suppress(ImportError):  # before some release it was a model's own
        from vllm.models.common.ops import fused_allreduce_rms_norm as plain

        calls.append((plain.fused_allreduce_rms_norm, RMSNorm, 0.0))
    torch.manual_seed(1)
    parts, residual = torch.randn(2, ROWS, HIDDEN).bfloat16(), torch.randn(ROWS, HIDDEN).bfloat16()
    for call, kind, bias in calls:
        norm = kind(HIDDEN, eps=EPS).bfloat16()
        norm.weight.data.normal_()
        expected = residual_rms_norm(parts[0] + parts[1], residual, norm.weight.data, EPS, weight_bias=bias)
        before = sum(communicator.llm_allreduce.report()["calls"].values())
        with torch.inference_mode():
            got = call(parts[rank].clone(), residual.clone(), norm)
        assert sum(communicator.llm_allreduce.report()["calls"].values()) == before + 1
        assert torch.equal(got[1], expected.residual_out)
        assert expected.norm_out is not None
        assert torch.equal(got[0], expected.norm_out)
        # Of two types, which our kernels do not take: vLLM's own norm, behind our sum.
        wide = kind(HIDDEN, eps=EPS).float()
        with torch.inference_mode():
            call(parts[rank].clone(), residual.clone(), wide)
        assert sum(communicator.llm_allreduce.report()["calls"].values()) == before + 2
    assert importlib.import_module(GEMMA)._can_use_flashinfer(parts[rank], 2) == (False, 0)


def refuses_checkpoints(communicator: Any) -> None:
    """While ranks share memory; sleep, which lets go of memory alone, goes on."""
    if hasattr(communicator, "suspend"):  # of some release on
        communicator.suspend()
        communicator.resume()
    try:
        communicator.checkpoint_prepare()
    except NotImplementedError as error:
        assert "start vLLM with allreduce_strategy NCCL" in str(error)
    else:
        message = "a checkpoint was prepared"
        raise AssertionError(message)


class Layers(torch.nn.Module):
    """Two layer boundaries of vLLM's own parts."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.first = RMSNorm(HIDDEN, eps=EPS, dtype=torch.bfloat16)
        self.second = RMSNorm(HIDDEN, eps=EPS, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, total = self.first(tensor_model_parallel_all_reduce(x), residual)
        y, total = self.second(tensor_model_parallel_all_reduce(y * 2), total)
        return y, total


def compiled(rank: int, folder: str) -> None:
    """A model in bfloat16 through vLLM's compiler and passes, fused and not."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    load_general_plugins()
    ours = logging.getLogger("llm_allreduce_plugin")
    ours.addHandler(Handler())
    ours.setLevel(logging.INFO)
    for strategy, fuse_norm in (("ONESHOT", True), ("UB", False)):
        lines.clear()
        config = VllmConfig(
            parallel_config=ParallelConfig(tensor_parallel_size=2),
            compilation_config=CompilationConfig(mode=CompilationMode.VLLM_COMPILE, custom_ops=["none"]),
            additional_config={"allreduce": {"allreduce_strategy": strategy, "fuse_norm": fuse_norm}},
        )
        with tensor_parallel(rank, f"{folder}/store-{strategy}-compiled", config) as tp:
            check_compiled(rank, config, fuse_norm=fuse_norm)
            report = tp.llm_allreduce.report()
        seen = {name: report[name] for name in ("calls", "fallbacks", "registered_memory")}
        fusion = [line for line in lines if line.startswith("all-reduce fusion: ")]
        say("compiled", rank=rank, strategy=strategy, lines=fusion, **seen)


def check_compiled(rank: int, config: VllmConfig, *, fuse_norm: bool) -> None:
    """Fused, the model has the bits of our definition; vLLM's own norm rounds elsewhere."""
    torch.manual_seed(0)
    parts = torch.randn(2, ROWS, HIDDEN).bfloat16()
    residual, weights = torch.randn(ROWS, HIDDEN).bfloat16(), torch.randn(2, HIDDEN).bfloat16()
    first = residual_rms_norm(parts[0] + parts[1], residual, weights[0], EPS)
    assert first.norm_out is not None
    second = residual_rms_norm(first.norm_out * 4, first.residual_out, weights[1], EPS)
    assert second.norm_out is not None
    limits = {"rtol": 0, "atol": 0} if fuse_norm else {"rtol": 0.03, "atol": 0.03}
    model = support_torch_compile(dynamic_arg_dims={"x": 0, "residual": 0})(Layers)(vllm_config=config)
    model.first.weight.data.copy_(weights[0])
    model.second.weight.data.copy_(weights[1])
    for _ in range(3):
        with torch.inference_mode(), set_forward_context(None, config):
            norm, total = model(parts[rank].clone(), residual.clone())
        torch.testing.assert_close(norm, second.norm_out, **limits)
        torch.testing.assert_close(total, second.residual_out, **limits)


def run(function: Any, *arguments: str, ranks: int = 2) -> None:
    mp.start_processes(function, arguments, ranks, start_method="fork")  # type: ignore[attr-defined]


def main() -> None:
    folder, profile, *parts = sys.argv[1:]
    if "registration" in parts:
        for function in (alone, registration):
            run(_in_a_process, function.__name__, ranks=1)
    if "groups" in parts:
        run(groups, folder, profile)
    if "compiled" in parts:
        os.environ["CPU_OPS_COMPILE"] = "1"  # of scripts/vllm_cpu_ops
        run(compiled, folder)


def _in_a_process(rank: int, name: str) -> None:
    {"alone": alone, "registration": registration}[name]()


if __name__ == "__main__":
    main()
