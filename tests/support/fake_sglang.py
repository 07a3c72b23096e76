"""A package in SGLang's place: the targets of our hooks and the registry, of which a test may leave some out."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

_BASE = "sglang.srt."
GROUP = _BASE + "distributed.parallel_state.GroupCoordinator"
ARGUMENTS = _BASE + "server_args.ServerArgs"
APPLIES = _BASE + "layers.layer_boundary.residual.add_norm.flashinfer_ar_fusion_applies"
NORM = _BASE + "layers.layernorm._forward_with_allreduce_fusion"


class HookType(Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"


class HookSource(NamedTuple):
    plugin_name: str
    dist_name: str


class ServerArgs(SimpleNamespace):
    """One that somebody fills in."""

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tp-size")

    def resolve_once(self) -> None:
        self.resolved = True


class GroupCoordinator:
    """One of two ranks, both of which have the same part of a sum."""

    def __init__(self, unique_name: str) -> None:
        self.unique_name = unique_name
        self.ranks, self.rank_in_group, self.world_size, self.device = [0, 1], 0, 2, torch.device("cpu")
        self.cpu_group = None

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        return input_ * 2

    def destroy(self) -> None:
        self.destroyed = True


def flashinfer_ar_fusion_applies(batch_size: int) -> bool:
    return 0 < batch_size <= 2048


def _forward_with_allreduce_fusion(_norm: object, *_args: Any) -> str:
    return "SGLang's"


class Registry:
    """As SGLang's: applies what was not applied yet, and goes on where that fails."""

    def __init__(self, fails_at: Iterable[str]) -> None:
        self.fails_at = set(fails_at)
        self.registered: list[tuple[str, Callable[..., Any], HookType]] = []
        self._patched: set[str] = set()

    def register(self, target: str, hook: Callable[..., Any], kind: HookType, *, source: HookSource) -> None:
        assert source.plugin_name == "llm_allreduce"
        self.registered.append((target, hook, kind))

    def apply_hooks(self) -> None:
        for target, hook, kind in self.registered:
            if target not in self._patched | self.fails_at:
                self._patched.add(target)
                _patch(target, hook, kind)


def _patch(target: str, hook: Callable[..., Any], kind: HookType) -> None:
    place, _, name = target.rpartition(".")
    owner: Any = sys.modules.get(place)
    if owner is None:
        module, _, kind_name = place.rpartition(".")
        owner = getattr(sys.modules[module], kind_name)
    is_static = isinstance(owner.__dict__[name], staticmethod)
    wrapped = _wrap(getattr(owner, name), hook, kind)
    setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)


def _wrap(original: Callable[..., Any], hook: Callable[..., Any], kind: HookType) -> Callable[..., Any]:
    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        if kind is HookType.AROUND:
            return hook(original, *args, **kwargs)
        if kind is HookType.BEFORE:
            hook(*args, **kwargs)
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        after = hook(result, *args, **kwargs)
        return result if after is None else after

    return run


def install(
    monkeypatch: pytest.MonkeyPatch, *, version: str = "0.6.0", lacks: Iterable[str] = (), fails_at: Iterable[str] = ()
) -> Registry:
    """Put it in SGLang's place for a test.

    Args:
        monkeypatch: the test's.
        version: of the package.
        lacks: targets that it does not have.
        fails_at: targets at which hooks cannot be applied, which its registry does not tell.
    """
    for name in [name for name in sys.modules if name == "sglang" or name.startswith("sglang.")]:
        monkeypatch.delitem(sys.modules, name)
    registry = Registry(fails_at)
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": version},
        "srt.plugins.hook_registry": {"HookRegistry": registry, "HookSource": HookSource, "HookType": HookType},
        "srt.server_args": {"ServerArgs": _copy(ServerArgs)},
        "srt.distributed.parallel_state": {"GroupCoordinator": _copy(GroupCoordinator)},
        "srt.layers.layer_boundary.residual.add_norm": {"flashinfer_ar_fusion_applies": flashinfer_ar_fusion_applies},
        "srt.layers.dp_attention": {"is_dp_attention_enabled": lambda: False},
        "srt.layers.layernorm": {"_forward_with_allreduce_fusion": _forward_with_allreduce_fusion},
    }
    for place, names in contents.items():
        module = _module(monkeypatch, ".".join(filter(None, ["sglang", place])))
        for name, value in names.items():
            setattr(module, name, value)
    arguments = SimpleNamespace(tp_size=2, device="cpu", enforce_disable_flashinfer_allreduce_fusion=False)
    context = _module(monkeypatch, "sglang.srt.runtime_context")
    context.__dict__.update(get_server_args=lambda: arguments, get_forward=SimpleNamespace)
    for target in lacks:
        owner, _, name = target.rpartition(".")
        place, _, kind = owner.rpartition(".")
        delattr(sys.modules[owner] if owner in sys.modules else getattr(sys.modules[place], kind), name)
    return registry


def _copy(kind: type) -> type:
    """A class that a test may patch."""
    return type(
        kind.__name__, kind.__bases__, {name: value for name, value in vars(kind).items() if name != "__dict__"}
    )


def _module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A module and the packages that it is in."""
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__path__ = []
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(_module(monkeypatch, parent), last, module)
    return module
