"""scripts/sglang_cpu_ops: what importing, deriving and decorating may do, and what raises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "sglang_cpu_ops"


def run(program: str, *, wanted: str = "1", line: str = (FOLDER / "sglang_cpu_ops.pth").read_text()) -> str:
    """A program behind the line that Python runs when it starts; no packages but the standard library's."""
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{line}\n{program}"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": wanted},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_name_can_be_imported_derived_from_and_decorated_with() -> None:
    run("""
import importlib, triton, triton.language as tl
from torchvision.transforms import InterpolationMode
from sgl_kernel.flash_attn import flash_attn_varlen_func
from triton.runtime import KernelInterface

@triton.autotune(configs=[triton.Config({"BLOCK": 64}, num_warps=4)], key=["n"])
@triton.jit
def add(x, n: tl.constexpr, y: tl.dtype | None = None, z: "tl.dtype" = tl.float32): pass

class Launcher(KernelInterface):
    def __init__(self, number): self.number = number

assert Launcher(3).number == 3 and Launcher.__mro__ == (Launcher, object)
assert not isinstance(3, tl.dtype) and not issubclass(int, tl.dtype)
assert 3 not in InterpolationMode.BICUBIC and list(tl.x) == []
assert importlib.import_module("triton.a.b.c").__version__ == "0.0.0" and triton.__file__
assert not hasattr(triton, "__wrapped__") and not hasattr(add, "__wrapped__")
""")


@pytest.mark.parametrize(
    ("line", "error", "text"),
    [
        ("triton.jit(f)[(4,)](1)", NotImplementedError, "f was launched: Triton is not installed"),
        ("sgl_kernel.silu_and_mul(1)", NotImplementedError, "sgl_kernel.silu_and_mul was called: sgl_kernel is not"),
        ("triton.runtime.driver.active", RuntimeError, "triton.runtime.driver.active: there is no GPU"),
    ],
)
def test_what_would_compute_raises(line: str, error: type[Exception], text: str) -> None:
    out = run(f"""
import sgl_kernel, triton.runtime
def f(x): pass
try:
    {line}
except {error.__name__} as error:
    print(error)
""")
    assert text in out


def test_only_where_sglangs_cpu_engine_is_asked_for(tmp_path: Path) -> None:
    find = "import importlib.util; print(importlib.util.find_spec('triton'))"
    assert run(find, wanted="0").strip() == "None"
    assert "sglang_cpu_ops" in run(find)
    installed = tmp_path / "triton.py"
    installed.write_text("")
    assert str(installed) in run(f"sys.path.append({str(tmp_path)!r}); {find}"), "installed packages come first"


def test_no_nccl_for_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang takes the library that this variable names, and none where it cannot be opened."""
    monkeypatch.delenv("SGLANG_NCCL_SO_PATH", raising=False)
    load = """
import ctypes, os
name = os.environ.get("SGLANG_NCCL_SO_PATH")
try:
    ctypes.CDLL(name) if name else print("SGLang's own")
except OSError as error:
    print(error)
"""
    assert "no-nccl-on-cpu-ranks.so: cannot open" in run(load)
    assert run(load, wanted="0").strip() == "SGLang's own"
    monkeypatch.setenv("SGLANG_NCCL_SO_PATH", "mine.so")
    assert "mine.so: cannot open" in run(load), "what the user names stays"
