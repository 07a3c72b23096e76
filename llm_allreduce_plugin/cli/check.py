"""llm-allreduce check: will this node and this environment work?"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import textwrap
from typing import Annotated

import typer
from rich.console import Console

from llm_allreduce_plugin import diagnosis
from llm_allreduce_plugin.base.validation import printable
from llm_allreduce_plugin.cli import options
from llm_allreduce_plugin.diagnosis import Finding, Verdict, across
from llm_allreduce_plugin.diagnosis.proof import Prover
from llm_allreduce_plugin.measure.torchrun import Place

EPILOG = options.epilog(
    "llm-allreduce check",
    "llm-allreduce check --no-proof    (a moment, and starts nothing)",
    "llm-allreduce check --json > check.json",
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --no-python llm-allreduce "
    "check --torchrun",
)
_COLORS = {Verdict.OK: typer.colors.GREEN, Verdict.WARN: typer.colors.YELLOW, Verdict.FAIL: typer.colors.RED}
_WIDTH = 110


def _print(findings: list[Finding]) -> None:
    for found in findings:
        label = typer.style(f"{found.verdict:<4}", fg=_COLORS[found.verdict])
        first, *rest = textwrap.wrap(printable(found.text), _WIDTH) or [""]
        typer.echo(f"{label}  {found.name:<14}  {first}")
        for line in rest:
            typer.echo(f"{'':22}{line}")
        for number, line in enumerate(textwrap.wrap(printable(found.advice), _WIDTH - 3)):
            typer.echo(f"{'':22}{'   ' if number else '-> '}{line}")


def _summary(findings: list[Finding]) -> str:
    counts = [sum(found.verdict is verdict for found in findings) for verdict in (Verdict.WARN, Verdict.FAIL)]
    if counts[1]:
        return f"{counts[1]} FAIL, {counts[0]} WARN: this will not work before what failed is repaired"
    return f"no FAIL, {counts[0]} WARN: all-reduces work here"


def _of_ranks(*, as_json: bool) -> None:
    """The first rank speaks for all."""
    try:
        place = Place.of()
    except ValueError as error:
        message = f"--torchrun: {error}"
        raise typer.BadParameter(message) from None
    findings, hangs = across.findings(place)
    failed = any(found.verdict is Verdict.FAIL for found in findings)
    if place.rank == 0 or failed:
        _tell(findings, as_json=as_json, proved=True)
    if hangs:
        os._exit(1)  # a thread that never returns would keep this process
    if failed:
        raise typer.Exit(1)


def _tell(findings: list[Finding], *, as_json: bool, proved: bool) -> None:
    failed = any(found.verdict is Verdict.FAIL for found in findings)
    if as_json:
        rows = [dataclasses.asdict(found) for found in findings]
        typer.echo(json.dumps({"works": not failed, "proved": proved, "findings": rows}, indent=1))
    else:
        _print(findings)
        typer.echo(f"\n{_summary(findings)}")
    sys.stdout.flush()


def check(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    proof: Annotated[
        bool, typer.Option("--proof/--no-proof", help="Also start ranks that write to and read from each other.")
    ] = True,
    torchrun: Annotated[
        bool,
        typer.Option("--torchrun", help="Only prove what joins the ranks that torchrun has started, on any hosts."),
    ] = False,
) -> None:
    """Say whether this node and this Python environment will work, and what to do where they will not.

    Each line is OK, WARN (works, but slower or not for everyone) or FAIL. Peer access and shared host memory are proved
    by short-lived ranks, one to a GPU, or by two CPU ranks where there are no GPUs; a link that hangs them ends the
    proof, not this command. The exit code is 1 when a line says FAIL, otherwise 0.

    With `--torchrun` this is one of the ranks that `torchrun ... --no-python llm-allreduce check --torchrun` starts on
    each host. They prove that they are in one NVLink domain, or say why not, and that sums over all of them are right.
    """
    if torchrun:
        _of_ranks(as_json=as_json)
        return
    with Prover() as prover:
        if proof:
            prover.begin()  # loads torch while this process looks
        findings, topology = diagnosis.look()
        if not as_json:
            _print(findings)
        proved = proof and topology is not None
        if proof and topology is not None:
            with Console(stderr=True).status("ranks start, and write to and read from each other ..."):
                proofs = diagnosis.prove(topology, prover)
            findings += proofs
            if not as_json:
                _print(proofs)
    failed = any(found.verdict is Verdict.FAIL for found in findings)
    if as_json:
        rows = [dataclasses.asdict(found) for found in findings]
        typer.echo(json.dumps({"works": not failed, "proved": proved, "findings": rows}, indent=1))
    else:
        typer.echo(f"\n{_summary(findings)}{'' if proved else ' (nothing was proved)'}")
    if failed:
        raise typer.Exit(1)
