"""What changes in SGLang, and why. Each hook names the upstream change that would replace it.

1. ``ServerArgs.add_cli_args``, after it: our flags (``flags.py``). Arguments of plugins would replace it.
2. ``ServerArgs.resolve_once`` (0.5.17 and 0.5.18: ``__post_init__``), before it: bad settings end the server before any
   scheduler starts, and FlashInfer's fusion is turned off where ours takes its place. A hook for plugins that check
   arguments would replace it; what an entry point raises is only logged.
3. ``GroupCoordinator.__init__``, after it: tensor-parallel groups get a communicator (``communicator.py``), and the
   hooks of fused layer boundaries come in (``fusion.py``).
4. ``GroupCoordinator.all_reduce``, around it: runs on that communicator. On the method and not in ``ca_comm``, of which
   several parts of SGLang ask whether it is their own class, and which CPU ranks do not look at.
5. ``GroupCoordinator.destroy``, before it: the communicator is closed while its ranks can still talk.
   A registry of device communicators, asked when a group is made, would replace 3 to 5.
6. ``kill_process_tree``, before it, where a server ends itself so: the summary, which otherwise comes at its exit.
   It runs no exit handlers; an orderly end would replace this.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
from typing import Any

from llm_allreduce_plugin.engines.common import versions
from llm_allreduce_plugin.engines.common.fusion_ops import register_operator as register_fused_operator
from llm_allreduce_plugin.engines.common.reports import read_reports
from llm_allreduce_plugin.engines.common.summary import tell_now
from llm_allreduce_plugin.engines.sglang import all_reduce_op, communicator, flags, fusion, hooks
from llm_allreduce_plugin.engines.sglang.hooks import Hook
from llm_allreduce_plugin.engines.sglang.settings import overridden, settings_of, stands_aside

logger = logging.getLogger("llm_allreduce_plugin")

TRIED = ((0, 5, 17), (0, 5, 23))
_ARGUMENTS = "sglang.srt.server_args.ServerArgs"
_KILL = "sglang.srt.utils.common.kill_process_tree"


@functools.cache
def register() -> None:
    """Install the hooks. Called by SGLang in every process, before it applies any hooks; makes no CUDA call."""
    import sglang

    wanted = our_hooks()
    if absent := hooks.missing(wanted):
        logger.warning(
            "SGLang %s is left alone, as if this plugin were not installed: it has no %s",
            sglang.__version__,
            ", ".join(absent),
        )
        return
    if (doubt := untried(sglang.__version__)) is not None:
        logger.warning("%s", doubt)
    register_fused_operator()
    all_reduce_op.register_operator()
    hooks.add(wanted)
    hooks.add(hook for hook in [Hook(_KILL, before_kill, "BEFORE")] if hooks.exists(hook.target))


def untried(version: str) -> str | None:
    """What to say of a version that this plugin was not tried with, or None."""
    return versions.untried("SGLang", version, *TRIED, "all hooks")


def our_hooks() -> list[Hook]:
    """The hooks of this version of SGLang."""
    before = f"{_ARGUMENTS}.resolve_once"
    if not hooks.exists(before):
        before = f"{_ARGUMENTS}.__post_init__"
    return [
        Hook(f"{_ARGUMENTS}.add_cli_args", add_flags, "AFTER"),
        Hook(before, check_arguments, "BEFORE"),
        *communicator.HOOKS,
    ]


def add_flags(_result: object, parser: argparse.ArgumentParser, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401
    """After SGLang has added its own."""
    flags.add_to(parser)


def check_arguments(server_args: Any, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401
    """Before SGLang resolves its arguments, in the process that starts the others.

    Raises:
        ConfigError: a setting is wrong; SGLang then does not start.
    """
    if getattr(server_args, "_resolution_finished", False):  # and is sealed
        return
    settings = settings_of(server_args)
    if server_args.tp_size == 1 or stands_aside(server_args, settings) is not None:
        return  # whose reason the group tells
    settings.check_world_size(server_args.tp_size)
    if lost := hooks.not_applied(communicator.HOOKS):
        logger.warning("SGLang's own all-reduce is left in place: %s", hooks.not_installed(lost))
        return
    fuses = fusion.prepare(server_args, settings) is None
    for line in overridden(server_args, settings, fuses=fuses):
        logger.warning("%s", line)
    if fuses:
        # FlashInfer's kernel would take all-reduces away; SGLang turns it on by itself for some models. A rank says it.
        server_args.enforce_disable_flashinfer_allreduce_fusion = True
    if settings.report_dir is not None:
        # With --enable-metrics ranks count in Prometheus' multi-process mode; without it there is no endpoint.
        read_reports(settings.report_dir, _log_as_it_is, metrics=False)


def before_kill(parent_pid: int | None, include_parent: bool = True, *_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401, FBT001, FBT002
    """Before SGLang kills processes, this one perhaps among them."""
    if include_parent and parent_pid == os.getpid():
        try:
            tell_now()
        except Exception:
            logger.exception("all-reduce: the summary at the end could not be made")  # and SGLang's end goes on


def _log_as_it_is() -> None:
    """SGLang sets the root logger up, to which our lines go."""
