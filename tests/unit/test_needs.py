"""What the wheel asks for is what the package imports, and nothing else."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Imported by another name than the one that is installed.
NAMES = {"nvidia-ml-py": "pynvml", "pyyaml": "yaml"}
# What the engine's own installation brings, and what bench measures where it is installed.
BROUGHT = {"torch", "vllm", "sglang", "transformers", "tokenizers", "safetensors", "flashinfer", "triton"}
# Asked for although nothing here imports it: torch.distributed sends objects through it.
INDIRECT = {"numpy"}


def _imported() -> dict[str, Path]:
    """Packages from outside, with a file that imports each."""
    found: dict[str, Path] = {}
    for path in sorted((ROOT / "llm_allreduce_plugin").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            found |= {name.split(".")[0]: path for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names}


def _named(needs: list[str]) -> set[str]:
    words = [re.match(r"[A-Za-z0-9._-]+", need) for need in needs]
    plain = [word[0].lower() for word in words if word is not None]
    return {NAMES.get(word, word.replace("-", "_")) for word in plain}


def test_needs_are_what_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = _named(project["dependencies"])
    extras = _named([need for name in ("plot", "metrics") for need in project["optional-dependencies"][name]])
    imported = _imported()
    unasked = {
        name: path for name, path in imported.items() if name not in needs | extras | BROUGHT | {"llm_allreduce_plugin"}
    }
    assert unasked == {}, "imported, but nobody installs it"
    assert needs - INDIRECT - imported.keys() == set(), "asked for, but not imported"
    assert extras <= imported.keys()
