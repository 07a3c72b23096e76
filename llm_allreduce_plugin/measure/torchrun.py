"""Ranks that torchrun has started, on any hosts, as a pool: the first one says what is run, the others follow."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llm_allreduce_plugin.base.validation import shown

if TYPE_CHECKING:
    from llm_allreduce_plugin.measure.ranks import RankContext

TIMEOUT_S = 300.0  # ranks of two hosts import torch, make contexts, and NCCL looks for its networks
_MOST_DIGITS = 9
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Place:
    """Of a rank, as torchrun says it."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ, command: str = "check") -> Place:
        """Of this process. ``command``: which of this package is to be started, for the error.

        Raises:
            ValueError: torchrun has not started it, or a variable is not what torchrun sets.
        """
        missing = [name for name in _VARIABLES if not environment.get(name)]
        if missing:
            message = (
                f"{', '.join(missing)} not set: start it on every host with torchrun, like torchrun --nnodes 2 "
                "--nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --no-python llm-allreduce "
                f"{command} --torchrun"
            )
            raise ValueError(message)
        place = cls(*(_number(name, environment[name]) for name in _VARIABLES[:3]))
        for name, number in (("RANK", place.rank), ("LOCAL_RANK", place.local_rank)):
            if number >= place.world_size:
                message = f"{name}={number}: must be less than WORLD_SIZE={place.world_size}"
                raise ValueError(message)
        return place


def _number(name: str, text: str) -> int:
    """That a variable holds.

    Raises:
        ValueError: it holds none, or a negative one.
    """
    word = text.strip()
    if not (word.isascii() and word.isdecimal() and len(word) <= _MOST_DIGITS):
        message = f"{name}={shown(text)}: must be a whole number, as torchrun sets it"
        raise ValueError(message)
    return int(word)


@contextlib.contextmanager
def joined(place: Place, told: Callable[[str], None] = lambda _: None, *, on_gpu: bool) -> Iterator[RankContext]:
    """The group of all these ranks, which ends with the block: see :meth:`RankContext.leave`. Collective.

    Args:
        place: of this process.
        told: is given what is being done.
        on_gpu: each rank has the GPU of its number on its host.
    """
    import torch
    import torch.distributed as dist

    from llm_allreduce_plugin.measure.ranks import context_of

    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    told("meeting the other ranks")
    patience = dt.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        rank=place.rank,
        world_size=place.world_size,
        timeout=patience,
        device_id=device if on_gpu else None,
    )
    try:
        context = context_of(place.rank, place.world_size, device, patience)
    except BaseException:
        dist.destroy_process_group()
        raise
    try:
        yield context
    finally:
        context.leave()


class Lead:
    """Runs functions on all ranks, of which this is the first; the others are in :func:`follow`."""

    def __init__(self, context: RankContext) -> None:
        self._context = context

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,  # noqa: ANN401
        timeout_s: float = TIMEOUT_S,  # noqa: ARG002  (that of the group)
        ranks: list[int] | None = None,
    ) -> list[Any]:
        """``function(context, *arguments)`` on all ranks; their results. ``ranks``: all of them.

        Raises:
            RankFailedError: an AssertionError, with every failed rank's traceback.
            ValueError: ``ranks`` are some.
        """
        if ranks is not None and len(ranks) != self._context.world_size:
            message = f"{len(ranks)} of {self._context.world_size} ranks: all of them take part"
            raise ValueError(message)
        _tell(self._context, (function, arguments))
        return _results(self._context, function, arguments)

    def end(self) -> None:
        """Let the others go."""
        _tell(self._context, None)


def follow(context: RankContext) -> None:
    """Run what the first rank says, until there is no more.

    Raises:
        RankFailedError: a function has failed on a rank.
    """
    while (job := _tell(context, None)) is not None:
        _results(context, *job)


def _tell(context: RankContext, job: Any) -> Any:  # noqa: ANN401
    """The first rank's job, on every rank."""
    import torch.distributed as dist

    jobs = [job]
    dist.broadcast_object_list(jobs, src=0, group=context.control_group)
    return jobs[0]


def _results(context: RankContext, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
    from llm_allreduce_plugin.measure.ranks import RankFailedError

    try:
        mine = (True, function(context, *arguments))
    except Exception:  # noqa: BLE001  (reported on every rank)
        mine = (False, traceback.format_exc())
    everyone = context.gather(mine)
    if failed := {rank: text for rank, (worked, text) in enumerate(everyone) if not worked}:
        raise RankFailedError(failed)
    return [value for _, value in everyone]
