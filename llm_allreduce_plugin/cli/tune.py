"""llm-allreduce tune: measure this node, so that AUTO knows it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_allreduce_plugin.algorithms.facts import SUPPORTED_WORLD_SIZES
from llm_allreduce_plugin.algorithms.ranges import ONE_KERNEL, TWO_KERNELS, Range
from llm_allreduce_plugin.base.validation import MOST_CHARACTERS, printable
from llm_allreduce_plugin.cli import options, outputs, tune_ranks
from llm_allreduce_plugin.cli.bench import message_sizes
from llm_allreduce_plugin.cli.options import DTYPES, parse_bytes
from llm_allreduce_plugin.errors import CacheError, ProfileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from llm_allreduce_plugin.config import AllReduceConfig
    from llm_allreduce_plugin.measure.ranks import Ranks
    from llm_allreduce_plugin.profiles.entry import Entry, FusedMeasured, FusedRange, Measured
    from llm_allreduce_plugin.profiles.file import Profile
    from llm_allreduce_plugin.topology import NodeIdentity, NodeTopology
    from llm_allreduce_plugin.tuning.plan import Group, Plan

EPILOG = options.epilog(
    "llm-allreduce tune",
    "llm-allreduce tune --quick --tp 2,4",
    "llm-allreduce tune --transport host --output profile.json",
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --no-python llm-allreduce "
    "tune --torchrun",
)

SECONDS = 55.0  # of a minute; the rest is for what is under way when it ends
QUICK_SECONDS = 9.0
LARGEST, LARGEST_QUICK, LARGEST_CPU = "256M", "64M", "4M"  # messages, by default
_LARGEST_HELP = f"Largest message; default: {LARGEST}, with --quick {LARGEST_QUICK}, of CPU ranks {LARGEST_CPU}."
LARGEST_CPU_GROUP = 2  # by default: CPU ranks are for trying out


def _world_sizes(text: str | None, available: int, device: str) -> tuple[int, ...]:
    """``"2,4"``; by default every supported world size that ``available`` devices can form.

    Raises:
        typer.BadParameter: one is not a world size, or there are too few devices.
    """
    if text is None:
        return tuple(size for size in SUPPORTED_WORLD_SIZES if size <= available)
    sizes = []
    for part in text.split(","):
        size = options.parse_ranks(part)
        if size is None or size not in SUPPORTED_WORLD_SIZES:
            message = f"--tp {text}: {part.strip()!r} must be 2 to {SUPPORTED_WORLD_SIZES[-1]}"
            raise typer.BadParameter(message)
        if device == "cuda" and size > available:
            message = f"--tp {text}: this node has {available} GPUs"
            raise typer.BadParameter(message)
        sizes.append(size)
    return tuple(sorted(set(sizes)))


def _dtypes(text: str) -> tuple[str, ...]:
    """One dtype of each element size."""
    names = [part.strip().lower() for part in text.split(",")]
    for name in names:
        if name not in DTYPES:
            message = f"--dtype {text}: {name!r} must be one of {', '.join(DTYPES)}"
            raise typer.BadParameter(message)
    wanted = tuple(dict.fromkeys(DTYPES[name] for name in names))
    if {"float16", "bfloat16"} <= set(wanted):
        message = f"--dtype {text}: a profile has one entry for 16-bit elements; give bfloat16 or float16"
        raise typer.BadParameter(message)
    return wanted


def _transport(text: str, device: str) -> str:
    from llm_allreduce_plugin.config import TransportChoice

    if text.lower() not in set(TransportChoice):
        message = f"--transport {text}: must be one of {', '.join(TransportChoice)}"
        raise typer.BadParameter(message)
    if device == "cpu" and text.lower() != TransportChoice.AUTO:
        message = f"--transport {text}: CPU ranks have one transport; leave it out"
        raise typer.BadParameter(message)
    return text.lower()


def _node(device: str) -> tuple[NodeIdentity, NodeTopology | None]:
    """This node, and its GPUs if they are measured."""
    from llm_allreduce_plugin.topology import NodeIdentity, NodeTopology

    if device == "cpu":
        return NodeIdentity.of_cpu(), None
    import torch

    topology = NodeTopology.detect()
    return NodeIdentity.of_gpus(topology, torch.cuda.get_device_name(0)), topology


def _fail(text: str) -> typer.Exit:
    typer.echo(f"error: {text}", err=True)
    return typer.Exit(2)


def tune(
    *,
    tp: Annotated[
        str | None,
        typer.Option("--tp", metavar="SIZES", help="World sizes, like 2,4; default: all that can be formed."),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", "-d", metavar="DTYPES", help="Of 16 and 32 bits, like bfloat16,float32.")
    ] = "bfloat16",
    transport: Annotated[
        str, typer.Option("--transport", help="GPUs: auto, peer or host memory; each has entries of its own.")
    ] = "auto",
    minbytes: Annotated[str, typer.Option("--minbytes", "-b", help="Smallest message, in bytes per rank.")] = "1K",
    maxbytes: Annotated[str | None, typer.Option("--maxbytes", "-e", help=_LARGEST_HELP)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes, less often: under 15 seconds.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="CPU ranks, even where there are GPUs.")] = False,
    torchrun: Annotated[
        bool,
        typer.Option("--torchrun", help="Measure the ranks that torchrun has started, on any hosts, as one group."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write here; default: the cache folder, where AUTO looks."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that cannot be read or is of another node.")
    ] = False,
) -> None:
    """Measure which strategy is fastest for which size on this node, and keep it where AUTO finds it.

    And whether residual and norm are faster in the kernel of the sum or in one of their own; where the settings ask for
    registered memory (`registered_pool`, or UB), whether results that go straight into it are.

    Every answer is verified, bit for bit, before anything is timed; times are those of the slowest rank, in CUDA graphs
    and eager. What it has of one group is kept before it goes on to the next. Engines use the result from their next
    start on.

    With `--torchrun` this is one of the ranks that `torchrun ... --no-python llm-allreduce tune --torchrun` starts on
    each host. What they measure is kept on the first rank's host, whose word counts when a group starts.
    """
    started = time.monotonic()

    import torch

    from llm_allreduce_plugin.profiles import file as profiles
    from llm_allreduce_plugin.profiles.search import cache_path
    from llm_allreduce_plugin.tuning.plan import Group, plan_of

    place = tune_ranks.place_of(tp) if torchrun else None
    cpu |= torchrun and not torch.cuda.is_available()
    if place is not None and place.rank > 0:
        tune_ranks.follow_first(place, on_gpu=not cpu)
    outputs.check_file("--output", output, devices=False)
    available = 0 if cpu else torch.cuda.device_count()
    if place is None and not cpu and available < 2:  # noqa: PLR2004
        message = f"this node has {available} GPU{'s' * (available != 1)}: nothing to tune; --cpu tries CPU ranks"
        raise _fail(message)
    device = "cpu" if cpu else "cuda"
    world_sizes = (place.world_size,) if place else _world_sizes(tp, LARGEST_CPU_GROUP if cpu else available, device)
    groups = [Group(size, name) for size in world_sizes for name in _dtypes(dtype)]
    chosen, registered = _transport(transport, device), _registered_pool(options.configured(), device)
    largest = parse_bytes("--maxbytes", maxbytes or (LARGEST_CPU if cpu else LARGEST_QUICK if quick else LARGEST))
    sizes = message_sizes(parse_bytes("--minbytes", minbytes), largest, 4 if quick else 2, None, halves=False)
    if sizes[0] % 16:
        message = f"--minbytes {minbytes}: must be a multiple of 16"
        raise typer.BadParameter(message)
    node, topology = _node(device)
    try:
        path = output or cache_path(node)
    except CacheError as error:
        message = f"{error}; or give --output FILE"
        raise _fail(message) from None
    if output is None:
        outputs.check_file("--output (by default)", path, devices=False)
    try:
        profiles.check_replaceable(path, node)
    except ProfileError as error:
        if not force:
            message = f"{error}; it is not replaced without --force"
            raise _fail(message) from None
        typer.echo(f"# {error}; it will be replaced")
    typer.echo(f"# llm-allreduce tune: {node.description}; {'; '.join(map(str, groups))}")
    seconds = (QUICK_SECONDS if quick else SECONDS) - (time.monotonic() - started)
    kept = _Kept(path, node, topology, force=force)
    ranks = tune_ranks.ranks_of(place, max(world_sizes), device)
    _measure(ranks, groups, chosen, plan_of(sizes, seconds, quick=quick), kept.add, registered)
    if kept.profile is None:
        raise typer.Exit(1)
    typer.echo(_last_line(path, kept.profile, time.monotonic() - started))


class _Kept:
    """The file, to which what is measured is added as it comes; ``profile``: what it has now."""

    def __init__(self, path: Path, node: NodeIdentity, topology: NodeTopology | None, *, force: bool) -> None:
        self._path = path
        self._node = node
        self._topology = topology
        self._force = force
        self.profile: Profile | None = None

    def add(self, entry: Entry) -> None:
        """Print an entry and write it.

        Raises:
            typer.Exit: it cannot be written.
        """
        from llm_allreduce_plugin.profiles import file as profiles

        typer.echo(_report(entry, self._topology))
        try:
            self.profile = profiles.store(self._path, self._node, [entry], force=self._force)
        except ProfileError as error:
            raise _fail(str(error)) from None


def versions() -> dict[str, str]:
    """What a profile says of its environment, as records do: versions, driver, commit and command, where known."""
    from llm_allreduce_plugin.measure.environment import environment

    names = ("driver", "cuda", "torch", "nccl", "python", "llm_allreduce_plugin", "commit", "command")
    known = environment()
    return {name: printable(str(known[name]))[:MOST_CHARACTERS] for name in names if known.get(name)}


def _measure(
    ranks: contextlib.AbstractContextManager[Ranks],
    groups: list[Group],
    transport: str,
    plan: Plan,
    keep: Callable[[Entry], None],
    registered_pool: int | None,
) -> None:
    """Each group's entry to ``keep``; a bar on stderr tells how far it is when a person watches.

    ``registered_pool``: with which UB is measured, in bytes; None: it is not.

    Raises:
        typer.Exit: a strategy's answer was wrong.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from llm_allreduce_plugin.measure.ranks import FAILURES, in_a_line
    from llm_allreduce_plugin.tuning.measure import tune
    from llm_allreduce_plugin.tuning.plan import WrongAnswerError

    started = time.monotonic()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting ranks", total=1.0)
        try:
            with ranks as pool:
                left = plan.within(plan.seconds - (time.monotonic() - started))
                refused = tune(
                    pool,
                    groups,
                    transport,
                    left,
                    versions(),
                    lambda text, share: progress.update(task, description=text, completed=share),
                    keep,
                    registered_pool=registered_pool,
                )
        except (WrongAnswerError, *FAILURES) as error:
            typer.echo(f"error: {in_a_line(error)}", err=True)
            raise typer.Exit(1) from None
    for group, reason in refused.items():
        typer.echo(f"# {group}: left out: {reason}")


def _report(entry: Entry, topology: NodeTopology | None) -> str:
    """The times and what follows from them. ``topology``: the GPUs of this node; None: CPU ranks were measured."""
    from llm_allreduce_plugin.group.multicast import group_outlook
    from llm_allreduce_plugin.selection.policy import describe_ranges

    lines = [f"#\n# {entry}, over {entry.topology_class.in_words}: us per call, the fastest marked"]
    placed = ("UB",) if entry.registered is not None else ()
    lines += _times(("ONESHOT", "TWOSHOT", *placed), entry.measured)
    if entry.decides_in_graphs:
        lines.append(f"# in graphs: {describe_ranges(entry.graph)}")
    lines.append(f"# eager: {describe_ranges(entry.eager)}")
    if (registered := entry.registered) is not None:
        ranges = registered.graph if entry.decides_in_graphs else registered.eager
        is_faster = any(found.strategy == "UB" for found in ranges)
        lines.append(
            f"# results that may go into registered outputs: {describe_ranges(ranges)}"
            if is_faster
            else "# stored straight into registered outputs (UB), results were at no size faster"
        )
    if (fused := entry.fused) is not None:
        lines.append(f"# with residual and norm behind the sum, in one kernel or in two (rows of {fused.hidden}):")
        lines += _times((ONE_KERNEL, TWO_KERNELS), fused.measured)
        if entry.decides_in_graphs:
            lines.append(f"# in graphs: {describe_ranges([_in_words(found) for found in fused.graph])}")
        lines.append(f"# eager: {describe_ranges([_in_words(found) for found in fused.eager])}")
    if entry.decides_in_graphs:
        lines.append("# those in graphs decide, for eager calls too: a rank that captures and one that does not must")
        lines.append("# run the same kernel, and the times of eager calls are mostly the host's")
        lines.append("# calls by multicast are not measured: AUTO and MINLATENCY never choose them")
    if topology is not None and entry.hosts == 1:
        multicast = group_outlook(topology, entry.world_size, entry.transport, entry.topology_class)
        lines += [f"# {multicast}"] if multicast else []
    return "\n".join(lines)


def _times(names: Sequence[str], rows: Sequence[Measured | FusedMeasured]) -> Iterator[str]:
    """A table of what was measured; the fastest of each size is marked."""
    head = " ".join(f"{name:>10}" for name in names)
    yield f"#{'bytes':>12}  {head} in graph   {head} eager"
    for row in rows:
        sides = []
        for times in (row.graph_us, row.eager_us):
            best = min(times.values(), default=None)
            by_name = {str(key): time_us for key, time_us in times.items()}
            cells = [
                "-" if (value := by_name.get(name)) is None else f"{value:.2f}{'*' if value == best else ' '}"
                for name in names
            ]
            sides.append(" ".join(f"{cell:>10}" for cell in cells))
        yield f"{row.bytes:>13}  {sides[0]}            {sides[1]}"


def _registered_pool(config: AllReduceConfig, device: str) -> int | None:
    """Registered memory that the settings ask for, in bytes, with which UB is measured; None: they do not."""
    from llm_allreduce_plugin.algorithms.user_buffer import DEFAULT_CPU_POOL_BYTES, DEFAULT_GPU_POOL_BYTES
    from llm_allreduce_plugin.config import AllReduceStrategy

    if config.registered_pool is not None:
        return int(config.registered_pool)
    if config.allreduce_strategy is not AllReduceStrategy.UB:
        return None
    return DEFAULT_CPU_POOL_BYTES if device == "cpu" else DEFAULT_GPU_POOL_BYTES


def _in_words(found: FusedRange) -> Range:
    return Range(found.max_bytes, {ONE_KERNEL: "one kernel", TWO_KERNELS: "two kernels"}[found.runs])


def _last_line(path: Path, profile: Profile, seconds: float) -> str:
    return f"# {path} has {len(profile.entries)} entries now; took {seconds:.0f} s"
