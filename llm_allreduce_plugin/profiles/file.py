"""A tuning profile: what was measured on a node, and which strategy follows from it; and the file that it lives in."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.ranges import Range, TunedRanges
from llm_allreduce_plugin.base.files import read_json
from llm_allreduce_plugin.errors import ProfileError, UnreadableFileError
from llm_allreduce_plugin.topology.identity import NodeIdentity
from llm_allreduce_plugin.topology.links import TopologyClass, Transport

SCHEMA = "llm-allreduce tuning profile"
SCHEMA_VERSION = 1
LOCK_TIMEOUT_S = 60.0
_MOST_FAULTS = 3  # that an error names

# The kernels of the exact class. A profile that names anything else is not valid, so no profile can change bits.
Kernel = Literal["ONESHOT", "TWOSHOT"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProfileRange(_Frozen):
    """Messages up to ``max_bytes`` per rank (None: all larger ones) run on ``strategy``."""

    max_bytes: int | None = Field(ge=0)
    strategy: Kernel


class Measured(_Frozen):
    """Microseconds per call of every strategy at one size; those that had become far slower are left out."""

    bytes: int = Field(ge=1)
    graph_us: dict[Kernel, float] = Field(default_factory=dict)
    eager_us: dict[Kernel, float] = Field(default_factory=dict)


class Entry(_Frozen):
    """What was measured for one kind of group.

    Attributes:
        world_size: ranks.
        transport: how they reach each other.
        topology_class: what their bytes travel over.
        in_band: whether readiness travels inside the data, as a setting says.
        element_bytes: size of an element; ``dtype`` is the one that was measured.
        date: when, in UTC.
        method: how.
        environment: versions and driver.
        graph: ranges by the times in CUDA graphs.
        eager: ranges by the times of eager calls.
        measured: the times behind them.
    """

    world_size: int = Field(ge=2)
    transport: Transport
    topology_class: TopologyClass
    in_band: bool
    element_bytes: Literal[2, 4]
    dtype: str
    date: str
    method: str
    environment: dict[str, str]
    graph: tuple[ProfileRange, ...]
    eager: tuple[ProfileRange, ...]
    measured: tuple[Measured, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("graph", "eager"):
            limits = [found.max_bytes for found in getattr(self, name)]
            bounded = [limit for limit in limits[:-1] if limit is not None]
            if not limits or limits[-1] is not None or len(bounded) < len(limits) - 1:
                message = f"{name}: the last range, and no other, has max_bytes null"
                raise ValueError(message)
            if bounded != sorted(set(bounded)):
                message = f"{name}: max_bytes must rise, not {bounded}"
                raise ValueError(message)
        return self

    @property
    def key(self) -> tuple[object, ...]:
        """What there is one entry for."""
        return (self.world_size, self.transport, self.in_band, self.element_bytes)

    def serves(self, facts: GroupFacts) -> bool:
        """True when a group of this kind was measured."""
        in_band = facts.in_band.two_shot > 0
        return (self.world_size, self.transport, self.in_band) == (facts.world_size, facts.transport, in_band)

    @property
    def decides_in_graphs(self) -> bool:
        """Whether ``graph`` decides, for every call, or ``eager`` does. The only place that says which.

        One of them for all calls of a group: a rank that captures a graph while another makes the call at once must
        launch the same kernel. On GPUs it is ``graph``: times in graphs are the GPU's, those of eager calls mostly the
        host's, which do not depend on the strategy. CPU ranks have no graphs.
        """
        return self.transport is not Transport.SHM

    @property
    def in_words(self) -> str:
        """Which times decide: ``measured <date> ...``."""
        return "in CUDA graphs" if self.decides_in_graphs else "in eager calls"

    def ranges(self) -> TunedRanges:
        """Those that decide, as the policy takes them."""
        ranges = self.graph if self.decides_in_graphs else self.eager
        return TunedRanges(self.element_bytes, tuple(Range(found.max_bytes, found.strategy) for found in ranges))

    def __str__(self) -> str:
        return f"{self.world_size} ranks, {self.transport} memory, {8 * self.element_bytes}-bit elements"


class Profile(_Frozen):
    """All entries of one node."""

    schema_name: Literal["llm-allreduce tuning profile"] = Field(default="llm-allreduce tuning profile", alias="schema")
    schema_version: Literal[1] = 1
    device: Literal["cuda", "cpu"]
    gpu: str = Field(description="name of the GPUs, or of the CPU")
    architecture: int | None
    fingerprint: str
    node: str = Field(description="what the fingerprint is of, for people")
    entries: tuple[Entry, ...]

    @model_validator(mode="after")
    def _no_entry_twice(self) -> Self:
        keys = [entry.key for entry in self.entries]
        if len(set(keys)) < len(keys):
            message = "entries: two are for the same kind of group"
            raise ValueError(message)
        return self

    @classmethod
    def of(cls, node: NodeIdentity, entries: Sequence[Entry]) -> Profile:
        """A profile of ``node``."""
        return cls(
            device="cuda" if node.device == "cuda" else "cpu",
            gpu=node.name,
            architecture=node.architecture,
            fingerprint=node.fingerprint,
            node=node.description,
            entries=tuple(entries),
        )

    def foreign_to(self, node: NodeIdentity) -> str | None:
        """Why this was measured on other hardware than ``node``'s, or None: GPUs of another kind."""
        if (self.device, self.gpu) != (node.device, node.name):
            return f"it was measured on {self.gpu}, and this node has {node.name}"
        return None

    def of_another_node(self, node: NodeIdentity) -> str | None:
        """Why this is not about a node like ``node``, or None: other GPUs, or other links."""
        if (reason := self.foreign_to(node)) is not None:
            return reason
        if self.fingerprint != node.fingerprint:
            return f"it was measured on another node ({self.node}), and this one is {node.description}"
        return None

    def text(self) -> str:
        """The file: a line to each field of an entry and to each measured size."""
        document = self.model_dump(mode="json", by_alias=True)
        entries = []
        for entry in document.pop("entries"):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in entry.pop("measured"))
            fields = "".join(f"   {json.dumps(name)}: {json.dumps(value)},\n" for name, value in entry.items())
            entries.append(f'  {{\n{fields}   "measured": [\n{rows}\n   ]\n  }}')
        return json.dumps(document, indent=1)[:-2] + ',\n "entries": [\n' + ",\n".join(entries) + "\n ]\n}\n"


def _version_fault(document: Any) -> str | None:  # noqa: ANN401
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return "it is no tuning profile"
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        by = " (written by a newer version of this package)" if newer else ""
        return f"its schema version is {version!r}, and this package reads {SCHEMA_VERSION}{by}"
    return None


def read(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        ProfileError: naming the file and what is wrong with it.
    """
    try:
        document = read_json(path)
    except UnreadableFileError as error:
        raise ProfileError(path, f"it {error.reason}") from None
    if (fault := _version_fault(document)) is not None:
        raise ProfileError(path, fault)
    try:
        return Profile.model_validate(document)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'document'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        more = f"; and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
        raise ProfileError(path, "; ".join(faults[:_MOST_FAULTS]) + more) from None


def check_replaceable(path: Path, node: NodeIdentity) -> Profile | None:
    """The profile that a new one of ``node`` would be added to; None where there is no file yet.

    Raises:
        ProfileError: the file cannot be read, or belongs to another node, so that it must not be replaced unasked.
    """
    try:
        if not path.exists():
            return None
    except OSError as error:
        raise ProfileError(path, f"it cannot be read: {error.strerror or error}") from error
    profile = read(path)
    if (reason := profile.of_another_node(node)) is not None:
        raise ProfileError(path, reason)
    return profile


def store(path: Path, node: NodeIdentity, entries: Sequence[Entry], *, force: bool = False) -> Profile:
    """Write ``entries`` into the profile at ``path``, beside those of other kinds of groups that it has.

    Under a lock, and by renaming a finished file: processes that tune at once lose nothing, and a reader sees the file
    before or after.

    Args:
        path: the file; its folder is made.
        node: this node.
        entries: what was measured; each replaces the one of the same kind of group.
        force: replace a file that cannot be read or is of another node.

    Raises:
        ProfileError: there is such a file and ``force`` is off, or another process holds the lock, or writing failed.
    """
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(path.with_name(f".{path.name}.lock")), timeout=LOCK_TIMEOUT_S):
            try:
                before = check_replaceable(path, node)
            except ProfileError:
                if not force:
                    raise
                before = None
            new = {entry.key: entry for entry in (*(before.entries if before else ()), *entries)}
            profile = Profile.of(node, sorted(new.values(), key=lambda entry: str(entry.key)))
            _replace(path, profile.text())
    except Timeout:
        raise ProfileError(path, f"another process has held its lock for {LOCK_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise ProfileError(path, f"it cannot be written: {error.strerror or error}") from error
    return profile


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # mkstemp's files are the owner's alone
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
