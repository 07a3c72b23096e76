"""Our pass on graphs that vLLM's own layers make: of the version that is installed, and of others that are unpacked."""

from __future__ import annotations

import functools
import json

import pytest

from tests.support.marks import wants_slow
from tests.support.packages import INSTALLED, name_of
from tests.support.vllm_packages import PACKAGES, run_module

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def tries_all(package: str) -> bool:
    return package == INSTALLED or wants_slow()


@functools.cache
def faults_of(package: str) -> dict[str, str | None]:
    """The faults of the cases of ``tests.support.fusion_cases``, in one process of that version.

    All of them of the installed version; of others few, unless slow tests are asked for.
    """
    few = () if tries_all(package) else ("few",)
    result = run_module(package, "tests.support.fusion_cases", *few, VLLM_PLUGINS="")
    faults: dict[str, str | None] = json.loads(result.stdout.splitlines()[-1])
    return faults


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
@pytest.mark.parametrize(
    "what",
    [
        "RMSNorm, ", "GemmaRMSNorm, ", "layer, ", "gemma_layer, ", "native, ", "native_gemma, ", "custom, ",
        "transformers, ", "left alone: ", "norm only: ", "layers: ", "batch dimension", "pass manager",
        "compile ranges",
    ],
)  # fmt: skip
def test_boundaries_are_fused_as_they_are_written(package: str, what: str) -> None:
    of_these = {name: fault for name, fault in faults_of(package).items() if name.startswith(what)}
    assert of_these
    assert [f"{name}: {fault}" for name, fault in of_these.items() if fault is not None] == []


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_every_quantization_was_tried(package: str) -> None:
    names = faults_of(package)
    for quant in (
        "static", "token", "group", "group columns", "group aligned columns", "group packed", "nvfp4 swizzled",
        "nvfp4 linear", "native static", "native token", "native group", "native group columns",
    ):  # fmt: skip
        assert {f"RMSNorm, {place}, {quant}, bfloat16" for place in ("first", "middle")} <= names.keys()
        assert f"RMSNorm, middle, {quant}, and norm, bfloat16" in names
        others = ("GemmaRMSNorm", "native_gemma", "custom", "transformers") if tries_all(package) else ()
        for norm in ("native", *others):
            assert f"{norm}, middle, {quant}, bfloat16" in names
