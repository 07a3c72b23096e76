"""A tuning profile, all that was measured on a node, and the file that it lives in."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llm_allreduce_plugin.base.validation import PlainText, printable, read_document, shown
from llm_allreduce_plugin.errors import ProfileError, UnreadableFileError
from llm_allreduce_plugin.profiles.entry import Entry, Frozen
from llm_allreduce_plugin.topology.identity import NodeIdentity

SCHEMA = "llm-allreduce tuning profile"
# 1: without `fused`, which says nothing then. 1, 2: without `hosts`, of which there is one then. 1 to 3: without
# `registered`, which says nothing then. Written is the newest.
READABLE_VERSIONS = (1, 2, 3, 4)
SCHEMA_VERSION = READABLE_VERSIONS[-1]
LOCK_TIMEOUT_S = 60.0


class Profile(Frozen):
    """All entries of one node."""

    schema_name: Literal["llm-allreduce tuning profile"] = Field(default="llm-allreduce tuning profile", alias="schema")
    schema_version: Literal[1, 2, 3, 4] = 4
    device: Literal["cuda", "cpu"]
    gpu: PlainText = Field(description="name of the GPUs, or of the CPU")
    architecture: int | None
    fingerprint: PlainText
    node: PlainText = Field(description="what the fingerprint is of, for people")
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
        """Why this was measured on other hardware than ``node``'s, or None: GPUs of another kind.

        By their name, and by their architecture where both say it: a profile may have been edited or be an old one.
        """
        if (self.device, self.gpu) != (node.device, node.name):
            return f"it was measured on {self.gpu}, and this node has {node.name}"
        if None not in (self.architecture, node.architecture) and self.architecture != node.architecture:
            measured, here = (f"{node.name} (sm_{number})" for number in (self.architecture, node.architecture))
            return f"it was measured on {measured}, and this node has {here}"
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
        entries = [_block(entry, "  ") for entry in document.pop("entries")]
        return json.dumps(document, indent=1)[:-2] + ',\n "entries": [\n' + ",\n".join(entries) + "\n ]\n}\n"


def _block(fields: dict[str, Any], indent: str) -> str:
    """An object that ends with what was measured."""
    rows = ",\n".join(f"{indent}  {json.dumps(row)}" for row in fields.pop("measured"))
    lines = []
    for name, value in fields.items():
        if name in {"fused", "registered"} and value is None:
            continue
        if name == "fused":
            lines.append(f'{indent} "fused":\n{_block(value, indent + "  ")}')
        else:
            lines.append(f"{indent} {json.dumps(name)}: {json.dumps(value)}")
    lines.append(f'{indent} "measured": [\n{rows}\n{indent} ]')
    return f"{indent}{{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _version_fault(document: Any) -> str | None:  # noqa: ANN401
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return "it is no tuning profile"
    version = document.get("schema_version")
    if type(version) is not int or version not in READABLE_VERSIONS:  # True and 1.0 are in them, too
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        first = READABLE_VERSIONS[0]
        by = " (written by a newer version of this package)" if newer else ""
        found = printable(shown(version))
        return f"its schema version is {found}, and this package reads {first} to {SCHEMA_VERSION}{by}"
    return None


def read(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        ProfileError: naming the file and what is wrong with it: fields and their values.
    """

    def check(document: Any) -> None:  # noqa: ANN401
        if (fault := _version_fault(document)) is not None:
            raise ProfileError(path, fault)

    try:
        return read_document(path, Profile, "tuning profile", check=check)
    except UnreadableFileError as error:
        raise ProfileError(path, f"it {error.reason}") from None


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
