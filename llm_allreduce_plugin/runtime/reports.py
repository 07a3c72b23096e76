"""Reports of ranks: files of ``report_dir``, each written by one process and read by others, whatever lies there.

A folder may serve several servers, several groups of each (data parallel, pipeline stages), on several hosts, and it
keeps what earlier runs left. So a report says whose it is, and is in a file of that name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from llm_allreduce_plugin.algorithms.facts import LARGEST_WORLD_SIZE
from llm_allreduce_plugin.base.attempt import Attempt
from llm_allreduce_plugin.base.files import replace_text
from llm_allreduce_plugin.base.guarded import Guarded
from llm_allreduce_plugin.base.members import host_word
from llm_allreduce_plugin.base.validation import PlainText, read_document
from llm_allreduce_plugin.errors import UnreadableFileError

# Inherited by all processes of a server; set by the first of them. Not a setting.
SERVER_VARIABLE = "_LLM_ALLREDUCE_SERVER"
MOST_BYTES = 1 << 18  # of a report
MOST_READ = 512  # reports, the youngest ones: what one look at a folder costs is bounded
MOST_KEPT = 2 * LARGEST_WORLD_SIZE  # of processes that have ended: two runs of the largest group
READ_S = 2.0  # that reading waits for a folder that hangs
KEPT_S = 7 * 24 * 3600.0  # a report that nobody has touched for so long is not kept beyond that number
_PATTERN = "rank-*.json"

_Word = Annotated[PlainText, Field(max_length=64)]
_Name = Annotated[str, Field(max_length=160, pattern=r"^[A-Za-z0-9._+-]*$")]
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Text = Annotated[str, Field(max_length=4096)]  # for people


class FallbackCalls(BaseModel):
    """Calls that ran another strategy than the configured one."""

    model_config = ConfigDict(frozen=True, strict=True)

    requested: _Word
    strategy: _Word
    reason: Text
    calls: _Count


class RegisteredUse(BaseModel):
    """Registered memory in bytes, and what became of the outputs that were taken from it."""

    model_config = ConfigDict(frozen=True, strict=True)

    bytes: _Count
    stayed: _Count
    copied_out: _Count

    def __str__(self) -> str:
        """``registered memory of 4096 bytes: 7 of 9 outputs stayed in it, 2 were copied out, because ...``.

        Those of captured calls count once, whatever is replayed.
        """
        made, copied = self.stayed + self.copied_out, ""
        if self.copied_out:
            were = "was" if self.copied_out == 1 else "were"
            copied = f", {self.copied_out} {were} copied out, because nothing was free"
        outputs = f"{self.stayed} of {made} output{'s' * (made != 1)} stayed in it"
        return f"registered memory of {self.bytes} bytes: {outputs}{copied}"


class Report(BaseModel):
    """What a reader takes from a report; there is more in the file, for people.

    Attributes:
        rank: in its group.
        group: tells groups apart, on all hosts and in all runs; equal on all ranks of one.
        server: the same for all processes of one server; empty where nobody set one up.
        closed: the rank has said by itself what it did, or has nothing to say.
        calls: eager calls by strategy.
        captured: calls in CUDA graphs by strategy.
        fallback_calls: both, for each fallback.
        registered_memory: None: there is none.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    rank: int = Field(ge=0, lt=1 << 16)
    group: _Name = ""
    server: _Name = ""
    closed: bool = True
    calls: dict[_Word, _Count] = Field(default_factory=dict, max_length=64)
    captured: dict[_Word, _Count] = Field(default_factory=dict, max_length=64)
    fallback_calls: list[FallbackCalls] = Field(default_factory=list, max_length=256)
    registered_memory: RegisteredUse | None = None

    @property
    def total(self) -> int:
        """Calls of both kinds."""
        return sum(self.calls.values()) + sum(self.captured.values())


_Report = TypeVar("_Report", bound=Report)


# -- whose it is -------------------------------------------------------------------------------------------------------


def mark_server() -> None:
    """Let reports of the processes that this one starts be known as its own."""
    os.environ.setdefault(SERVER_VARIABLE, secrets.token_hex(8))


@dataclasses.dataclass(frozen=True)
class Identity:
    """Whose a report is.

    Attributes:
        rank: in its group.
        ranks: of the group, as the whole job numbers them: what tells pipeline stages apart.
        name: what the engine calls the group, like ``dp1``; may be empty.
        first_member: the name of the first rank's part in the group, see
            :func:`~llm_allreduce_plugin.base.members.new_member`.
    """

    rank: int
    ranks: Sequence[int]
    name: str
    first_member: str

    @property
    def group(self) -> str:
        """``dp1.ranks2-3.gpu07-4711-9f3a20-0``."""
        first, last = self.ranks[0], self.ranks[-1]
        in_a_row = list(self.ranks) == list(range(first, last + 1)) and last > first
        ranks = f"{first}-{last}" if in_a_row else "+".join(map(str, self.ranks))
        name = re.sub(r"[^A-Za-z0-9-]+", "-", self.name)[:24]
        return ".".join(part for part in (name, f"ranks{ranks[:48]}", self.first_member) if part)

    def fields(self) -> dict[str, Any]:
        """For a report."""
        return {
            "rank": self.rank,
            "world_size": len(self.ranks),
            "group": self.group,
            "server": os.environ.get(SERVER_VARIABLE, ""),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }


# -- files -------------------------------------------------------------------------------------------------------------


def file_name(rank: int, group: str) -> str:
    """The name of the file with this rank's report."""
    return f"rank-{rank}.{group}.json" if group else f"rank-{rank}.json"


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Replace the file of this report's rank and group: a reader sees the old or the new one, never half of one.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / file_name(report["rank"], report["group"]), json.dumps(report, indent=1) + "\n")


def read(path: Path) -> Report:
    """The report in a file.

    Raises:
        UnreadableFileError: it cannot be read or is no report, or another's than its name says.
    """
    return read_as(Report, path)


def read_as(model: type[_Report], path: Path) -> _Report:
    """The same, with what else ``model`` takes from it.

    Raises:
        UnreadableFileError: it cannot be read or is no report, or another's than its name says.
    """
    report = read_document(path, model, "report", most_bytes=MOST_BYTES)
    if path.name != file_name(report.rank, report.group):
        raise UnreadableFileError(path, "holds the report of another rank or group than its name says")
    return report


def found_in(folder: Path) -> list[tuple[float, Path]]:
    """Files that may be reports, with their times, the youngest first; as many as are ever read.

    Raises:
        OSError: the folder cannot be read.
    """
    return _youngest_first(folder)[:MOST_READ]


def _youngest_first(folder: Path) -> list[tuple[float, Path]]:
    found = []
    for path in folder.glob(_PATTERN):
        with contextlib.suppress(OSError):
            found.append((path.lstat().st_mtime, path))
    return sorted(found, reverse=True)


def of_this_server(folder: Path, since: float) -> Iterator[Report]:
    """The reports of this server's ranks in ``folder``, the youngest first; what is no report is left out.

    Never raises.

    ``since``: seconds since 1970. What was not written after that is an earlier run's.
    """
    server = os.environ.get(SERVER_VARIABLE, "")
    try:
        found = found_in(folder)
    except OSError:
        return
    for modified, path in found:
        if modified < since:
            return
        try:
            report = read(path)
        except UnreadableFileError:
            continue
        if not server or report.server in ("", server):
            yield report


class Reader:
    """Reads the reports of this server's ranks, and waits for no folder that hangs.

    Args:
        folder: of the reports.
        since: see :func:`of_this_server`.
    """

    def __init__(self, folder: Path, since: float) -> None:
        self._folder = folder
        self._since = since
        self._lock = threading.Lock()
        self._reading: Attempt[list[Report]] | None = None  # one that has not ended in time
        self._found: list[Report] = []
        failing, works = f"report_dir={folder} cannot be read", f"report_dir={folder} is read again"
        self._guarded = Guarded(failing, works, self._read)

    def read(self) -> list[Report]:
        """The youngest first; what was read the last time where the folder does not answer within ``READ_S``."""
        with self._lock:
            self._guarded()
            return self._found

    def _read(self) -> None:
        patience_s = READ_S if self._reading is None else 0.0
        try:
            reading = self._reading or Attempt(self._read_now, "reports")
        except RuntimeError:  # Python 3.12 starts no thread at a process's end: better late than not at all
            self._found = self._read_now()
            return
        if not reading.wait(patience_s):
            self._reading = reading
            message = f"no answer within {READ_S:g} s"
            raise TimeoutError(message)
        self._reading = None
        self._found = reading.result()

    def _read_now(self) -> list[Report]:
        return list(of_this_server(self._folder, self._since))


def prune(folder: Path) -> None:
    """Remove old reports of processes that have ended, so that restarts do not fill the folder.

    Beyond the ``MOST_KEPT`` youngest, those of processes that this host no longer has, and those of anywhere that
    nobody has touched for a week.

    Raises:
        OSError: the folder cannot be read.
    """
    own = re.escape(host_word())
    for modified, path in _youngest_first(folder)[MOST_KEPT:]:
        member = re.search(rf"\.{own}-(\d{{1,9}})-[0-9a-f]{{6}}-\d+\.json$", path.name)
        ended = member is not None and not Path("/proc", member[1]).exists()
        if ended or modified < time.time() - KEPT_S:
            with contextlib.suppress(OSError):  # another user's, or a folder: others go
                path.unlink()
