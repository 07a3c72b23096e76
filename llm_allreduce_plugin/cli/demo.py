"""llm-allreduce demo: a real server at tensor parallel 2, and whether its tokens are the right ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_allreduce_plugin.cli import options, outputs
from llm_allreduce_plugin.demo.serve import demo as run_demo

EPILOG = options.epilog(
    "llm-allreduce demo",
    "llm-allreduce demo TWOSHOT sglang",
    "llm-allreduce demo --compile --keep",
)


def _complete(incomplete: str) -> list[str]:
    engines = [name for name in ("vllm", "sglang") if name.startswith(incomplete.lower())]
    return [*options.complete_strategy(incomplete), *engines]


def demo(
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STRATEGY] [vllm|sglang]",
            help="In either order; ONESHOT and vllm unless given.",
            autocompletion=_complete,
            show_default=False,
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="vLLM: compile the model on CPU ranks, too, as on GPUs.")
    ] = False,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", metavar="FILE", help="Write the generated token ids here, as JSON.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep model, log and reports.")] = False,
) -> None:
    """Serve a small model on two GPUs, or two CPU ranks, and compare its tokens with Hugging Face's.

    Takes a minute or two. The model has random weights; nothing is downloaded.
    """
    outputs.check_file("--tokens", tokens)
    raise typer.Exit(run_demo(words or [], compiled=compiled, tokens_file=tokens, keep=keep))
