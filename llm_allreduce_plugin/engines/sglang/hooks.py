"""Hooks in SGLang's registry: which of their targets exist, and which of them took.

SGLang only logs what goes wrong while hooks are applied, and goes on without them. So every hook is looked for before
it is registered, and again before anything depends on it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Hook(NamedTuple):
    """A hook, as ``HookRegistry.register`` takes it.

    Attributes:
        target: the dotted name of what is hooked.
        function: what is called.
        kind: the name of a ``HookType``.
    """

    target: str
    function: Callable[..., Any]
    kind: str


def exists(target: str) -> bool:
    """Whether a dotted name is there in this version of SGLang."""
    try:
        pkgutil.resolve_name(target)
    except Exception:  # noqa: BLE001  (it may be the import of a module that this hardware is not for)
        return False
    return True


def missing(hooks: Iterable[Hook]) -> list[str]:
    """The targets that this version of SGLang does not have."""
    return [hook.target for hook in hooks if not exists(hook.target)]


def add(hooks: Iterable[Hook]) -> None:
    """Give the hooks to the registry; SGLang applies them once all plugins have been loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource("llm_allreduce", "llm_allreduce_plugin")
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType[hook.kind], source=source)


def add_late(hooks: Iterable[Hook]) -> None:
    """The same after SGLang has applied those of all plugins: these are applied at once."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    add(hooks)
    HookRegistry.apply_hooks()


def not_applied(hooks: Iterable[Hook]) -> list[str]:
    """The targets at which the hooks did not take, or at which another plugin has put something over them."""
    found = []
    for hook in hooks:
        parent, _, name = hook.target.rpartition(".")
        owner = pkgutil.resolve_name(parent)
        current = owner.__dict__.get(name)
        if not _calls(getattr(current, "__func__", current), hook.function):
            found.append(hook.target)
    return found


def not_installed(lost: Iterable[str]) -> str:
    """The reason that :func:`not_applied` gives for leaving SGLang's own in place."""
    return f"the hooks at {', '.join(lost)} could not be installed"


def _calls(wrapped: Any, function: Callable[..., Any]) -> bool:  # noqa: ANN401
    """Whether ``function`` is among the hooks around what ``wrapped`` wraps."""
    while wrapped is not None:
        if any(cell.cell_contents is function for cell in getattr(wrapped, "__closure__", None) or ()):
            return True
        wrapped = getattr(wrapped, "__wrapped__", None)
    return False
