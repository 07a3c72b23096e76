"""This Python environment: the package, torch, the driver, engines and settings. Imports none of them."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping, Sequence

from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.config import AllReduceConfig, TransportChoice, in_environment, load_config
from llm_allreduce_plugin.diagnosis.finding import Finding, fail, ok, warn
from llm_allreduce_plugin.errors import ConfigError
from llm_allreduce_plugin.group.layouts import peer_refusal, refusal_note
from llm_allreduce_plugin.profiles.search import with_profile
from llm_allreduce_plugin.selection.policy import table_of, uses_table
from llm_allreduce_plugin.topology import NodeIdentity

Version = tuple[int, ...]

PYTHONS = ((3, 11), (3, 13))  # tested
OLDEST_TORCH = (2, 9)  # whose symmetric memory maps what ranks cannot send each other as files
# Made for; README says which of them were run, and which only with their layers.
VLLMS = ((0, 26), (0, 33))
SGLANGS = ((0, 5, 17), (0, 5, 23))
ENTRY_POINT = "llm_allreduce"
VLLM_GROUP, SGLANG_GROUP = "vllm.general_plugins", "sglang.srt.plugins"


def dotted(version: Version) -> str:
    """``(13, 0)`` as ``13.0``."""
    return ".".join(map(str, version))


def parsed(text: str) -> Version:
    """The leading numbers of a version: ``2.13.0+cpu`` is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def installed(package: str) -> str | None:
    """A package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def toolkit_of_library() -> Version | None:
    """The CUDA release that the kernels were compiled with."""
    from llm_allreduce_plugin import _C

    number = _C.cuda_release()
    return (number // 1000, number % 1000 // 10) if number else None


def cuda_of_driver() -> Version | None:
    """The newest CUDA release that the driver serves; None without a driver. Makes no context."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def package() -> Finding:
    """That the native library loads, and belongs to these Python files."""
    try:
        from llm_allreduce_plugin import _C
    except ImportError as error:
        return fail(
            "package", f"llm_allreduce_plugin {__version__}: its library does not load: {error}", "install it again"
        )
    toolkit = toolkit_of_library()
    made = f", compiled with CUDA {dotted(toolkit)}" if toolkit else ", compiled without CUDA"
    return ok("package", f"llm_allreduce_plugin {__version__}, ABI {_C.abi_version()}{made}")


def python(version: Version = sys.version_info[:3]) -> Finding:
    """The interpreter."""
    text = f"Python {dotted(version)}"
    tested = f"{dotted(PYTHONS[0])} to {dotted(PYTHONS[1])}"
    if version[:2] < PYTHONS[0]:
        return fail("Python", text, f"use {tested}")
    if version[:2] > PYTHONS[1]:
        return warn("Python", text, f"tested are {tested}")
    return ok("Python", text)


def torch(version: str | None, *, gpus: int) -> Finding:
    """Torch, without the second it takes to import."""
    if version is None:
        return fail("torch", "not installed", "install the torch that your engine asks for (2.9 or newer)")
    if parsed(version)[:2] < OLDEST_TORCH:
        return fail("torch", version, f"{dotted(OLDEST_TORCH)} or newer is needed")
    if gpus and version.endswith("+cpu"):
        return fail("torch", f"{version} has no CUDA, and there are {gpus} GPUs", "install torch's CUDA build")
    return ok("torch", version)


def driver(name: str, serves: Version | None, toolkit: Version | None, *, gpus: int) -> Finding:
    """That the driver is new enough for the library: a runtime of a newer CUDA major release refuses to start."""
    if serves is None:
        if gpus:
            return fail(
                "driver", f"{name or 'unknown'}, but libcuda.so.1 does not load", "mount the driver's libraries"
            )
        return ok("driver", "none, and no GPUs")
    text = f"{name or 'version unknown'}, up to CUDA {dotted(serves)}"
    if toolkit is not None and serves[0] < toolkit[0]:
        advice = f"the kernels need a driver for CUDA {toolkit[0]}.0 or newer: update it, or build with an older nvcc"
        return fail("driver", text, advice)
    return ok("driver", text)


def vllm(
    version: str | None,
    entry_points: Sequence[str] | None = None,
    environment: Mapping[str, str] = os.environ,
    *,
    needed: bool = True,
) -> list[Finding]:
    """Which vLLM there is, and whether it loads the plugin.

    Args:
        version: None: none.
        entry_points: the names in vLLM's group; None: look.
        environment: variables.
        needed: whether its absence is worth a warning; off where there is another engine.
    """
    if version is None:
        if not needed:
            return [ok("vLLM", "not installed")]
        return [warn("vLLM", "not installed", "install vLLM 0.26 to 0.33 into this environment to serve with it")]
    # VLLM_PLUGINS= names none.
    chosen = environment.get("VLLM_PLUGINS")
    return [_release("vLLM", version, VLLMS), _loaded("vLLM", VLLM_GROUP, entry_points, "VLLM_PLUGINS", chosen)]


def sglang(
    version: str | None, entry_points: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """Which SGLang there is, and whether it loads the plugin. ``entry_points``: those of SGLang's group; None: look."""
    if version is None:
        return [ok("SGLang", "not installed")]
    # SGLANG_PLUGINS= is as if it were not set.
    chosen = environment.get("SGLANG_PLUGINS") or None
    return [
        _release("SGLang", version, SGLANGS),
        _loaded("SGLang", SGLANG_GROUP, entry_points, "SGLANG_PLUGINS", chosen),
    ]


def _release(engine: str, version: str, made_for: tuple[Version, Version]) -> Finding:
    first, last = made_for
    if first <= parsed(version)[: len(first)] <= last:
        return ok(engine, version)
    known = f"{dotted(first)} to {dotted(last)}"
    return warn(engine, version, f"this release is made for {known}; look for our lines in the log when it starts")


def _loaded(engine: str, group: str, entry_points: Sequence[str] | None, variable: str, chosen: str | None) -> Finding:
    """Whether an engine finds the plugin in its group of entry points, and the variable that chooses lets it in."""
    what = f"{engine} plugin"
    names = entry_points
    if names is None:
        names = [found.name for found in importlib.metadata.entry_points(group=group)]
    if ENTRY_POINT not in names:
        text = f"this environment has no entry point {ENTRY_POINT} in {group}"
        return fail(what, text, f"install the package with pip into {engine}'s environment")
    if chosen is not None and ENTRY_POINT not in [name.strip() for name in chosen.split(",")]:
        text = f"not loaded: {variable}={chosen!r} does not name it"
        return warn(what, text, f"add {ENTRY_POINT} to {variable}, or unset it")
    return ok(what, f"{ENTRY_POINT} is installed and will be loaded")


def settings() -> tuple[Finding, AllReduceConfig]:
    """The settings of file and environment, and the defaults when they are wrong."""
    try:
        config = load_config()
    except ConfigError as error:
        return fail("settings", str(error), "correct it: the engine refuses to start with it"), AllReduceConfig()
    given = config.model_dump(mode="json", exclude_unset=True)
    text = ", ".join(f"{name} {value}" for name, value in given.items()) or "defaults"
    source = in_environment().file
    return ok("settings", f"{text}{f' ({source} and environment)' if source else ''}"), config


def settings_for(found: Finding, config: AllReduceConfig, ranks: int) -> Finding:
    """What :func:`settings` found, unless a setting does not fit a group of so many ranks (0: there is none)."""
    try:
        if ranks:
            config.check_world_size(ranks)
    except ConfigError as error:
        return fail("settings", str(error), "correct it: every rank refuses to start with it")
    return found


def tuning_profile(config: AllReduceConfig, facts: GroupFacts, node: NodeIdentity) -> Finding:
    """What AUTO's choice rests on for a group of this node."""
    try:
        tuned, ignored = with_profile(config, facts, node)
    except ConfigError as error:
        return fail("tuning profile", str(error), "correct it: the engine refuses to start with it")
    source = table_of(config, tuned).source if uses_table(config) else "not used"
    if ignored:
        broken = any(": ignored" in line for line in ignored)
        advice = "measure again: llm-allreduce tune --force" if broken else "nothing, if that is intended"
        return warn("tuning profile", f"{source}; {'; '.join(ignored)}", advice)
    if tuned.tuned is None and uses_table(config):
        return ok("tuning profile", f"none: {source} (llm-allreduce tune measures this node)")
    return ok("tuning profile", source)


def variables(environment: Mapping[str, str] = os.environ, *, transport: str = "auto") -> list[Finding]:
    """Variables of others that change what all-reduces do."""
    found = []
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        if len(set(names)) < len(names):
            text = f"CUDA_VISIBLE_DEVICES={visible} names a GPU twice"
            found.append(fail("environment", text, "give every rank a GPU of its own"))
        elif not names or names == ["-1"]:
            text = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
            found.append(warn("environment", text, "unset it to use GPUs"))
        else:
            found.append(ok("environment", f"CUDA_VISIBLE_DEVICES={visible}"))
    if (note := refusal_note(TransportChoice(transport), peer_refusal(environment))) is not None:
        advice = "nothing where peer access is broken; elsewhere unset it, because host memory is slower"
        found.append(warn("environment", note, advice))
    with contextlib.suppress(ConfigError):  # which the settings' line tells
        if unknown := in_environment(environment).unknown:
            text = f"{', '.join(unknown)}: not a setting, and ignored"
            found.append(warn("environment", text, "correct the name, or nothing if something else reads it"))
    if "expandable_segments:True" in environment.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        text = "PYTORCH_CUDA_ALLOC_CONF has expandable_segments: our workspaces are allocated apart from it"
        found.append(ok("environment", text))
    if environment.get("CUDA_LAUNCH_BLOCKING") == "1":
        text = "CUDA_LAUNCH_BLOCKING=1: the host waits for every kernel"
        found.append(warn("environment", text, "unset it except to look for a fault"))
    shown = ("NCCL_DEBUG", "NCCL_ALGO", "NCCL_PROTO", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME", "NCCL_SHM_DISABLE")
    if others := [f"{name}={environment[name]}" for name in shown if name in environment]:
        found.append(ok("environment", f"{', '.join(others)}: of NCCL, which runs where no kernel here can"))
    return found
