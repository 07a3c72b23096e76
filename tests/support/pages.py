"""The documentation as tests see it: pages, their links, blocks of code, and the commands in them."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages of their own folders, which others link to.
FURTHER_PAGES = [
    ROOT / "CHANGELOG.md",
    ROOT / "tests" / "emulator" / "README.md",
    ROOT / "configs" / "tuning" / "README.md",
]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^ {4}.*\n(?:^ *\n(?=^ {4}))*)+", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def name_of(page: Path) -> str:
    """How a page is called in the name of a test."""
    return str(page.relative_to(ROOT))


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code: its language where it is said, and its lines without their indentation."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """All of a page, in order of kind."""
    text = page.read_text()
    found = [Block(match[2], match[3]) for match in _FENCE.finditer(text)]
    rest = _FENCE.sub("", text)
    # Four spaces behind an item of a list continue the item.
    for match in _INDENTED.finditer(rest):
        before = rest[: match.start()].rstrip("\n").rsplit("\n", 1)[-1]
        if not before.lstrip().startswith(("- ", "1. ")):
            found.append(Block("", "\n".join(line[4:] for line in match[0].splitlines())))
    return found


def prose(page: Path) -> str:
    """A page without its blocks."""
    return _INDENTED.sub("", _FENCE.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """What a page links to, pictures too."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number = sum(known == anchor or re.fullmatch(re.escape(anchor) + r"-\d+", known) is not None for known in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as a page tells to type it, and the output that it shows.

    Attributes:
        variables: what is set before it.
        words: program and arguments.
        output: the lines below it, where it stands behind a ``$``.
    """

    variables: dict[str, str]
    words: tuple[str, ...]
    output: tuple[str, ...] = ()

    def __str__(self) -> str:
        return shlex.join(self.words)


def _parsed(line: str, output: tuple[str, ...] = ()) -> Iterator[Command]:
    """Each command of a line; of a pipe the first, whose output is then another's."""
    bare = line.split(" #", 1)[0]
    parts = re.split(r"&&|;", bare)
    for part in parts:
        piped = part.split("|")
        try:
            words = shlex.split(piped[0].split(">")[0])
        except ValueError:  # prose with an apostrophe
            continue
        variables = {}
        while words and _ASSIGNMENT.fullmatch(words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words:
            yield Command(variables, tuple(words), output if len(parts) == len(piped) == 1 else ())


def commands(page: Path, *programs: str) -> list[Command]:
    """The commands of a page that start one of these programs: lines of blocks, and words between backticks."""
    found: list[Command] = []
    for block in blocks(page):
        if block.language not in ("", "bash"):
            continue
        lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
        for number, line in enumerate(lines):
            if line.startswith("$ "):
                below = lines[number + 1 :]
                end = next((i for i, other in enumerate(below) if other.startswith("$ ")), len(below))
                found += _parsed(line[2:], tuple(shown for shown in below[:end] if shown.strip()))
            else:
                found += _parsed(line)
    for words in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page)):
        found += _parsed(words)
    return [command for command in found if command.words[0] in programs]
