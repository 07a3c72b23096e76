"""Which profile a group uses: the configured one, the cached one of this node, a shipped one for its GPU, or none."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from llm_allreduce_plugin import _C
from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.ranges import Tuned
from llm_allreduce_plugin.config import NO_PROFILE, AllReduceConfig
from llm_allreduce_plugin.errors import CacheError, ConfigError, ProfileError
from llm_allreduce_plugin.profiles.file import Profile, read
from llm_allreduce_plugin.selection.policy import uses_table
from llm_allreduce_plugin.topology.identity import NodeIdentity
from llm_allreduce_plugin.topology.links import Transport

APPLICATION = "llm_allreduce_plugin"


@dataclasses.dataclass(frozen=True)
class Found:
    """What came of looking for a profile.

    Attributes:
        tuned: what the profile says about the group; None: seed tables decide.
        ignored: a line for the log for each file that was looked at in vain.
    """

    tuned: Tuned | None
    ignored: tuple[str, ...] = ()


def cache_path(node: NodeIdentity) -> Path:
    """Where ``llm-allreduce tune`` keeps the profile of a node: in the platform's cache folder, a file to a kind.

    Raises:
        CacheError: there is no such folder: this user has no home directory.
    """
    from platformdirs import user_cache_path

    try:
        folder = user_cache_path(APPLICATION)
        reason = "" if folder.is_absolute() else f"{folder} depends on the current folder"
    except (RuntimeError, KeyError, OSError) as error:  # of a user that nobody knows, without HOME
        reason = str(error)
    if reason:
        message = f"no cache of tuning profiles: {reason}; set XDG_CACHE_HOME to a folder, or tuning_profile to a file"
        raise CacheError(message)
    name = re.sub(r"[^a-z0-9]+", "-", node.name.lower()).strip("-")
    return folder / "tuning" / f"{name}-{node.fingerprint}.json"


def shipped_paths() -> list[Path]:
    """The profiles that come with the package: ``configs/tuning`` of a checkout; else beside the compiled library."""
    root = Path(__file__).resolve().parents[2]
    folders = [Path(_C.__file__).resolve().parent / "tuning_profiles"]
    if (root / "pyproject.toml").exists():
        folders.insert(0, root / "configs" / "tuning")
    return next((found for folder in folders if (found := sorted(folder.glob("*.json")))), [])


def _tuned(profile: Profile, facts: GroupFacts, name: str, *, anywhere: bool) -> Tuned | None:
    """What a profile says about a group; ``anywhere``: it may be of a node with other links between other GPUs."""
    entries = [
        entry
        for entry in profile.entries
        if entry.serves(facts) and (anywhere or entry.topology_class == facts.topology_class)
    ]
    if not entries:
        return None
    versions = {entry.environment.get(APPLICATION, __version__) for entry in entries} - {__version__}
    by = f" with version {', '.join(sorted(versions))}" if versions else ""
    dates = sorted({entry.date[:10] for entry in entries})
    how = entries[0].in_words  # of one transport, all of them
    return Tuned(f"{name}, measured {', '.join(dates)} {how}{by}", tuple(entry.ranges() for entry in entries))


def _has(profile: Profile) -> str:
    return "; ".join(map(str, profile.entries)) or "nothing"


def _configured(path: Path, facts: GroupFacts, node: NodeIdentity, name: str) -> Found:
    """The profile that a setting, of this ``name``, names. It need not be of this very node, but of its kind of GPUs.

    Raises:
        ConfigError: it cannot be used at all.
    """
    try:
        profile = read(path)
    except ProfileError as error:
        fault: ProfileError | None = error
    else:
        reason = profile.foreign_to(node)
        fault = None if reason is None else ProfileError(path, reason)
    if fault is not None:
        message = f"{name}: {fault} (give another file, or none, or leave the setting out)"
        raise ConfigError(message)
    tuned = _tuned(profile, facts, f"profile {path}", anywhere=True)
    if tuned is not None:
        return Found(tuned)
    hosts = f" on {facts.summed_hosts} hosts" if facts.summed_hosts > 1 else ""
    wanted = f"{facts.world_size} ranks{hosts} through {facts.transport.in_words}"
    return Found(None, (f"tuning profile {path}: it has no entry for {wanted} (it has {_has(profile)})",))


def _cached(node: NodeIdentity) -> tuple[Path | None, str | None]:
    """The cached profile of a node, if there is one; and a line for the log where nobody can tell."""
    try:
        path = cache_path(node)
    except CacheError as error:
        return None, str(error)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except OSError as error:  # a folder that may not be looked into
        return None, f"{ProfileError(path, f'it cannot be read: {error.strerror}')}: ignored"
    return path, None


def _candidates(node: NodeIdentity, cached: Path | None) -> Iterator[tuple[Path, str, bool]]:
    """Files that may have what is wanted, best first, what to call each, and whether it must be of this very node."""
    if cached is not None:
        yield cached, f"profile {cached}", True
    for path in shipped_paths():
        yield path, f"shipped profile {path.name} for {node.name}", False


def find(setting: Path | str | None, facts: GroupFacts, node: NodeIdentity, named: str = "tuning_profile") -> Found:
    """The profile for a group.

    Args:
        setting: ``tuning_profile``.
        facts: of the group, with its transport and slots.
        node: that the group runs on.
        named: what errors call the setting.

    Raises:
        ConfigError: the setting names a file that cannot be used. Any other file that cannot is ignored, with a line.
    """
    if setting == NO_PROFILE:
        return Found(None)
    ignored: list[str] = []
    if setting is not None:
        found = _configured(Path(setting), facts, node, named)
        if found.tuned is not None:
            return found
        ignored += found.ignored
    cached, obstacle = _cached(node)
    if obstacle is not None:
        ignored.append(obstacle)
    for path, name, this_node in _candidates(node, cached):
        try:
            profile = read(path)
        except ProfileError as error:
            ignored.append(f"{error}: ignored")
            continue
        if this_node and (reason := profile.of_another_node(node)) is not None:
            ignored.append(f"{ProfileError(path, reason)}: ignored")
            continue
        if profile.foreign_to(node) is not None:
            continue  # shipped for other GPUs
        tuned = _tuned(profile, facts, name, anywhere=this_node)
        if tuned is not None:
            return Found(tuned, tuple(ignored))
    return Found(None, tuple(ignored))


def with_profile(config: AllReduceConfig, facts: GroupFacts, node: NodeIdentity) -> tuple[GroupFacts, tuple[str, ...]]:
    """A group's facts with the profile that its table comes from, if any, and a line for each file that is ignored.

    Raises:
        ConfigError: ``tuning_profile`` names a file that cannot be used.
    """
    if facts.transport is Transport.NONE or not uses_table(config):
        return facts, ()
    found = find(config.tuning_profile, facts, node, config.name_of("tuning_profile"))
    return dataclasses.replace(facts, tuned=found.tuned), found.ignored
