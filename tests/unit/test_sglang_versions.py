"""An SGLang that nobody has tried: a named reason in the log, and SGLang as it was. Without SGLang."""

from __future__ import annotations

import pkgutil
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_allreduce_plugin.config import AllReduceConfig
from llm_allreduce_plugin.engines.sglang import boundaries, communicator, dense_layers, fusion, hooks, plugin
from tests.support import fake_sglang

_LOGGER = "llm_allreduce_plugin"
HOOKED = (
    f"{fake_sglang.ARGUMENTS}.add_cli_args",
    f"{fake_sglang.ARGUMENTS}.resolve_once",
    *(f"{fake_sglang.GROUP}.{name}" for name in ("__init__", "all_reduce", "destroy")),
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of what is done once in a process is done yet, and no setting is given."""
    for field in AllReduceConfig.model_fields:
        monkeypatch.delenv(f"LLM_ALLREDUCE_{field.upper()}", raising=False)
    monkeypatch.delenv("LLM_ALLREDUCE_STRATEGY", raising=False)
    monkeypatch.setattr(plugin, "register_fused_operator", _nothing)
    monkeypatch.setattr(plugin.all_reduce_op, "register_operator", _nothing)
    monkeypatch.setattr(boundaries, "_all_hooks_took", False)
    said_once = (fusion._say_kept_off, fusion._say_not_fused, fusion.own_kernels.watch)
    for cached in (fusion._hooks, fusion._installed, *said_once):
        cached.cache_clear()
    caplog.set_level("INFO", logger=_LOGGER)


def _nothing() -> None:
    pass


def register(monkeypatch: pytest.MonkeyPatch, **options: Any) -> fake_sglang.Registry:
    """What SGLang does with plugins: it loads them, then applies their hooks."""
    registry = fake_sglang.install(monkeypatch, **options)
    plugin.register.__wrapped__()
    registry.apply_hooks()
    return registry


def patched(*targets: str) -> list[str]:
    return [target for target in targets if hasattr(pkgutil.resolve_name(target), "__wrapped__")]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def a_group() -> Any:
    return pkgutil.resolve_name(fake_sglang.GROUP)("tp:0")


def test_the_fake_takes_hooks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise what is seen below would say nothing."""
    registry = register(monkeypatch)
    assert said(caplog) == [
        "all-reduce: SGLang 0.6.0 was not tried (this release is made for 0.5.17 to 0.5.23); all hooks were found, so "
        "the plugin stays on"
    ]
    assert [target for target, _, _ in registry.registered] == list(HOOKED)
    assert patched(*HOOKED) == list(HOOKED)
    assert hooks.not_applied(plugin.our_hooks()) == []
    assert fusion._installed() is None
    assert patched(fake_sglang.APPLIES, fake_sglang.NORM) == [fake_sglang.APPLIES, fake_sglang.NORM]


@pytest.mark.parametrize("version", ("0.5.17", "0.5.20.post1", "0.5.23", "0.5.23+cu130"))
def test_versions_that_were_tried(version: str) -> None:
    assert plugin.untried(version) is None


@pytest.mark.parametrize("version", ("0.5.16", "0.5.24", "0.6.0", "1.0", "main"))
def test_other_versions_are_named(version: str) -> None:
    assert f"SGLang {version} was not tried (this release is made for 0.5.17 to 0.5.23)" in str(plugin.untried(version))


# -- at the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [target for target in HOOKED if not target.endswith("__init__")])
def test_a_version_without_a_target_is_left_alone(
    lost: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = register(monkeypatch, lacks=[lost])
    named = lost.replace("resolve_once", "__post_init__")  # the older name is looked for last
    assert said(caplog) == [f"SGLang 0.6.0 is left alone, as if this plugin were not installed: it has no {named}"]
    assert registry.registered == []
    assert patched(*(target for target in HOOKED if target != lost)) == []


def test_a_version_without_the_class_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = register(monkeypatch, lacks=[fake_sglang.GROUP])
    (line,) = said(caplog)
    assert line.endswith("it has no " + ", ".join(HOOKED[2:]))
    assert registry.registered == []
    assert patched(*HOOKED[:2]) == []


# -- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["all_reduce", "destroy"])
def test_a_group_whose_hooks_did_not_take_keeps_its_own(
    lost: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = f"{fake_sglang.GROUP}.{lost}"
    register(monkeypatch, version="0.5.23", fails_at=[target])
    group = a_group()
    assert said(caplog) == [f"SGLang's own all-reduce is left in place: the hooks at {target} could not be installed"]
    assert communicator.communicator_in(group) is None
    x = torch.ones(3, 8)
    assert torch.equal(group.all_reduce(x), x * 2)
    group.destroy()
    assert group.destroyed


@pytest.mark.parametrize("lost", ["__init__", "all_reduce", "destroy"])
def test_before_anything_starts_it_is_known(
    lost: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of SGLang's is turned off, and somebody says it, whichever hook it is."""
    target = f"{fake_sglang.GROUP}.{lost}"
    register(monkeypatch, version="0.5.23", fails_at=[target])
    arguments = arguments_of(tp_size=2)
    arguments.resolve_once()
    assert arguments.resolved
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False
    assert said(caplog) == [f"SGLang's own all-reduce is left in place: the hooks at {target} could not be installed"]


def arguments_of(**fields: Any) -> Any:
    kind = pkgutil.resolve_name(fake_sglang.ARGUMENTS)
    return kind(device="cpu", enforce_disable_flashinfer_allreduce_fusion=False, **fields)


# -- layer boundaries --------------------------------------------------------------------------------------------------


def equipped() -> Any:
    """A group that has a communicator, over which both questions of a boundary are asked."""
    kind = pkgutil.resolve_name(fake_sglang.GROUP)
    group = kind.__new__(kind)
    group.ranks = [0, 1]
    setattr(group, boundaries.ATTRIBUTE, SimpleNamespace(no_norm_reason=""))
    return group


def layers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether SGLang gets its own answers, in a group that has a communicator."""
    group = equipped()
    monkeypatch.setattr(boundaries, "_group", lambda *, attention: group)
    ask, norm = pkgutil.resolve_name(fake_sglang.APPLIES), pkgutil.resolve_name(fake_sglang.NORM)
    x = torch.ones(2, 8)
    return [ask(rows) for rows in (0, 1, 2048, 4096)] == [False, True, True, False] and norm(
        SimpleNamespace(), x, x, None, x[0], True
    ) == "SGLang's"


@pytest.mark.parametrize("lost", [fake_sglang.APPLIES, fake_sglang.NORM])
@pytest.mark.parametrize("how", ["lacks", "fails_at"])
def test_boundaries_without_their_hooks_stay_sglangs(
    how: str, lost: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two hooks, neither does anything where the other one is not there."""
    registry = register(monkeypatch, version="0.5.23", **{how: [lost]})
    before = len(registry.registered)
    arguments = arguments_of(tp_size=2)
    arguments.resolve_once()
    assert arguments.enforce_disable_flashinfer_allreduce_fusion is False, "FlashInfer's fusion stays SGLang's"
    fusion.install(arguments, AllReduceConfig(), talks=True)
    reason = {"lacks": f"this SGLang has no {lost}", "fails_at": f"the hooks at {lost} could not be installed"}[how]
    assert said(caplog) == [
        f"all-reduce fusion: layer boundaries are not fused: {reason}; where SGLang fuses them itself, those "
        "all-reduces bypass allreduce_strategy"
    ]
    if how == "lacks":
        assert len(registry.registered) == before
        place, _, name = lost.rpartition(".")
        setattr(sys.modules[place], name, getattr(fake_sglang, name))  # which a layer would not ask
    assert layers_as_they_were(monkeypatch)


def test_boundaries_with_their_hooks_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same questions see the difference."""
    register(monkeypatch, version="0.5.23")
    fusion.install(arguments_of(tp_size=2), AllReduceConfig(), talks=True)
    assert not layers_as_they_were(monkeypatch)


def test_dense_layers_without_a_model_have_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, version="0.5.23")
    assert dense_layers.our_hooks() == []
