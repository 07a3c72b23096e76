"""The rooms of the package: a module imports only from its own room and from those before it, and in no circle."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from pathlib import Path

import pytest

PACKAGE = "llm_allreduce_plugin"
ROOT = Path(__file__).parents[2]
# In order: what a room imports is in it or in one before it. The last is the package's own ``__init__``.
ROOMS = (
    "_version",
    "_C",
    "errors",
    "base",
    "settings",
    "config",
    "wire",
    "quantization",
    "norm",
    "topology",
    "transport",
    "algorithms",
    "selection",
    "profiles",
    "group",
    "oracle",
    "runtime",
    "engines",
    "measure",
    "bench",
    "tuning",
    "compression",
    "diagnosis",
    "demo",
    "cli",
    "__main__",
    "",
)
# Known faults: none may be added, and one that is gone is taken out of here.
KNOWN_UPWARD: set[tuple[str, str]] = set()
KNOWN_CIRCLES: list[set[str]] = []

Imports = Mapping[str, set[str]]


def _name(path: Path, folder: Path) -> str:
    """Of a module, without the package's; empty for that itself."""
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(node: ast.AST, module: str, *, is_package: bool) -> list[str]:
    """Dotted names that a statement imports, each in the whole: ``from a import b`` is ``a.b``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    source = node.module or ""
    if node.level:
        here = [PACKAGE, *filter(None, module.split("."))]
        up = node.level - 1 if is_package else node.level
        source = ".".join([*here[: len(here) - up], *filter(None, [source])])
    return [f"{source}.{alias.name}" for alias in node.names]


def imports_of(root: Path) -> dict[str, set[str]]:
    """What each module imports of the package: inside of functions too, and for types alone."""
    folder = root / PACKAGE
    paths = {_name(path, folder): path for pattern in ("*.py", "*.pyi") for path in sorted(folder.rglob(pattern))}
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            for name in _imported(node, module, is_package=path.stem == "__init__"):
                first, *parts = name.split(".")
                if first != PACKAGE:
                    continue
                # A name of a module is the module; another one is in the longest that there is.
                ends = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
                target = next(end for end in ends if end in paths)
                if target != module:
                    found[module].add(target)
    return found


def room_of(module: str) -> int:
    """Where its room is in the order."""
    return ROOMS.index(module.partition(".")[0])


def upward(imports: Imports) -> set[tuple[str, str]]:
    """Imports of a module in a later room."""
    return {
        (module, target)
        for module, targets in imports.items()
        for target in targets
        if room_of(target) > room_of(module)
    }


def circles(imports: Imports) -> list[set[str]]:
    """Sets of modules of which each one leads to each other, by imports alone; two or more, in the order of names."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        reached[module], open_ = set(), list(imports[module])
        while open_:
            target = open_.pop()
            if target not in reached[module]:
                reached[module].add(target)
                open_ += imports[target]
    sets = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in imports
        if module in reached[module]
    }
    return sorted((set(found) for found in sets), key=sorted)


@functools.cache
def imports() -> Imports:
    """Of the package as it is; not when tests are collected, which every worker does."""
    return imports_of(ROOT)


def test_every_module_is_in_a_room() -> None:
    assert {module.partition(".")[0] for module in imports()} == set(ROOMS)


def test_imports_run_down_the_list() -> None:
    assert upward(imports()) == KNOWN_UPWARD


def test_no_circles() -> None:
    assert circles(imports()) == KNOWN_CIRCLES


# -- that it can fail --------------------------------------------------------------------------------------------------


def _planted(tmp_path: Path, files: Mapping[str, str]) -> Imports:
    clean = {
        "__init__.py": "from llm_allreduce_plugin.runtime.communicator import Communicator\n",
        "errors.py": "",
        "base/__init__.py": "",
        "base/files.py": "import json\nfrom llm_allreduce_plugin.errors import AllReduceError\n",
        "runtime/__init__.py": "",
        "runtime/calls.py": "from llm_allreduce_plugin.base.files import read_text\n",
        "runtime/communicator.py": "from llm_allreduce_plugin.runtime import calls\n",
    }
    for name, text in (clean | dict(files)).items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return imports_of(tmp_path)


def test_a_clean_tree_has_no_faults(tmp_path: Path) -> None:
    imports = _planted(tmp_path, {})
    assert imports["runtime.communicator"] == {"runtime.calls"}, "a module is not its package"
    assert imports["base.files"] == {"errors"}
    assert not upward(imports)
    assert not circles(imports)


@pytest.mark.parametrize(
    "statement",
    [
        "from llm_allreduce_plugin.runtime.calls import Call",
        "from llm_allreduce_plugin.runtime import calls",
        "import llm_allreduce_plugin.runtime.calls",
        "import llm_allreduce_plugin.runtime.calls as c",
        "from ..runtime import calls",
        "from ..runtime.calls import Call",
        "def late():\n    from llm_allreduce_plugin.runtime.calls import Call",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from llm_allreduce_plugin.runtime.calls import Call",
        "try:\n    from llm_allreduce_plugin.runtime.calls import Call\nexcept ImportError:\n    pass",
    ],
)
def test_an_import_that_runs_up_is_found(tmp_path: Path, statement: str) -> None:
    imports = _planted(tmp_path, {"base/files.py": statement})
    assert upward(imports) == {("base.files", "runtime.calls")}
    assert circles(imports) == [{"base.files", "runtime.calls"}]


def test_what_lies_in_the_package_itself_is_above_all(tmp_path: Path) -> None:
    imports = _planted(tmp_path, {"runtime/calls.py": "from llm_allreduce_plugin import Communicator"})
    assert upward(imports) == {("runtime.calls", "")}


def test_circles_are_found_within_a_room_and_over_several_modules(tmp_path: Path) -> None:
    three = {f"base/{one}.py": f"from . import {other}" for one, other in ("ab", "bc", "ca")}
    lone = {"runtime/calls.py": "def late():\n    from . import communicator"}
    imports = _planted(tmp_path, three | lone | {"base/files.py": "from . import a"})
    assert not upward(imports)
    assert circles(imports) == [{"base.a", "base.b", "base.c"}, {"runtime.calls", "runtime.communicator"}]


def test_a_module_in_no_room_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        upward(_planted(tmp_path, {"attic/things.py": "from llm_allreduce_plugin import errors"}))
