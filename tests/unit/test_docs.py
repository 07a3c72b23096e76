"""The pages are current: tables, links, and what they tell to type."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import llm_allreduce_plugin
from benchmarks import plots
from llm_allreduce_plugin import AllReduceConfig, NodeTopology
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.config import LowPrecisionConfig, environment_table
from llm_allreduce_plugin.runtime import reports
from tests.support.pages import FURTHER_PAGES, PAGES, ROOT, Command, anchors, blocks, commands, links, name_of

# Of the build and of the scripts, not settings.
OTHER_VARIABLES = {"LLM_ALLREDUCE_CUDA_ARCHS", "LLM_ALLREDUCE_NVCC"}
# These need no GPU and no ranks, and are done at once. Of the others, options and values are parsed.
RUN = {"explain", "topo", "breakeven", "plot", "report"}
NODE = ROOT / "configs" / "topologies" / "h200_x4_nvswitch.json"
pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.mark.parametrize("script", ["scripts/decision_table.py", "scripts/record_tables.py"])
def test_tables_are_current(script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLM_ALLREDUCE_")}
    command = [sys.executable, str(ROOT / script), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def test_pictures_are_of_the_records() -> None:
    assert plots.outdated() == []


# Each takes seconds beside other tests; the digest above tells whether the others are current.
@pytest.mark.parametrize("name", ["ms_per_token", "breakeven"])
def test_pictures_are_drawn(name: str, tmp_path: Path) -> None:
    drawn = plots.draw(name, tmp_path)
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("page", [*PAGES, *FURTHER_PAGES], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_every_page_and_picture_is_linked() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    files = {path for path in (ROOT / "docs").rglob("*") if path.is_file()} - {ROOT / "docs" / "README.md"}
    assert files <= linked, files - linked


@pages
def test_variables_and_files_exist(page: Path) -> None:
    text = page.read_text()
    known = {variable for variable, _ in environment_table()} | OTHER_VARIABLES
    known |= {"LLM_ALLREDUCE_TIMEOUT"} if "LLM_ALLREDUCE_TIMEOUT='5': unknown key" in text else set()
    named = set(re.findall(r"(?<!V)LLM_ALLREDUCE_[A-Z_]*[A-Z]", text))
    assert named <= known, f"{page.name}: {named - known}"
    for target in re.findall(r"`((?:docs|scripts|configs|tests|csrc|benchmarks)/[\w/.]+\.\w+)`", text):
        assert (ROOT / target).exists(), f"{page.name}: {target}"


def _rows(page: Path, heading: str) -> dict[str, list[str]]:
    """The table whose first heading is ``key`` behind a line that begins so: cells by key."""
    table = page.read_text().split(f"\n{heading}", 1)[1].split("| key |", 1)[1].split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
    return {row[0].strip("` "): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.mark.parametrize(
    ("heading", "model"), [("## One row for each key", AllReduceConfig), ("Inside `low_precision`", LowPrecisionConfig)]
)
def test_settings_have_a_row_each(heading: str, model: type[AllReduceConfig | LowPrecisionConfig]) -> None:
    rows = _rows(ROOT / "docs" / "settings.md", heading)
    assert list(rows) == sorted(rows, key=list(rows).index)
    assert set(rows) == set(model.model_fields)
    for key, (default, allowed, meaning) in rows.items():
        field = model.model_fields[key]
        assert meaning.endswith("."), key
        if isinstance(field.default, bool):
            assert default == ("on" if field.default else "off"), key
        elif isinstance(field.default, float):
            assert float(default) == field.default, key
            bound = next(m.le for m in field.metadata if hasattr(m, "le"))
            assert str(bound) in allowed, key
        elif isinstance(field.default, str):
            names = re.findall(r"`([^`]+)`", allowed)
            assert default == f"`{field.default}`", key
            assert names == [str(choice) for choice in type(field.default)], key


@pages
def test_settings_in_blocks_are_settings(page: Path) -> None:
    for block in blocks(page):
        if block.language != "yaml":
            continue
        values = yaml.safe_load(block.text)
        AllReduceConfig(**values.get("additional-config", {}).get("allreduce", values))


@pages
def test_engines_are_given_settings(page: Path) -> None:
    for command in commands(page, "vllm"):
        words = list(command.words)
        if "--additional-config" in words:
            given = json.loads(words[words.index("--additional-config") + 1])
            AllReduceConfig(**given.get("allreduce", given))
        for name in (word for word in words if word.startswith("configs/")):
            assert (ROOT / name).exists(), str(command)


@pages
def test_python_is_python(page: Path) -> None:
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(llm_allreduce_plugin.__name__):
                module = __import__(str(node.module), fromlist=["*"])
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pages
def test_scripts_exist_and_know_their_options(page: Path) -> None:
    for command in commands(page, "python", *(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.sh"))):
        script = next((word for word in command.words if re.match(r"(scripts|benchmarks)/", word)), None)
        if script is None:
            continue
        assert (ROOT / script).is_file(), str(command)
        text = (ROOT / script).read_text()
        for option in (word for word in command.words if word.startswith("--")):
            # A shell script may hand its arguments on.
            assert option in text or script.endswith(".sh"), str(command)


def _matches(shown: str, output: list[str]) -> bool:
    """Whether a line is in the output; three dots stand for anything, more lines included."""
    if shown.strip() == "...":
        return True
    pattern = ".*".join(re.escape(part.rstrip()) for part in shown.rstrip().split("..."))
    return any(re.fullmatch(pattern, line.rstrip()) for line in output)


def _has_placeholder(command: Command) -> bool:
    return any(re.search(r"\b(?:FILE|NAME|COMMAND|WORD)\b|<|\.\.\.", word) for word in command.words)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone of this repository on a node with 4 H200, as far as commands that only read see it."""
    for name in ("configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "node.json").write_bytes(NODE.read_bytes())
    (tmp_path / "bench.json").write_bytes((ROOT / "benchmarks" / "h200" / "bench_tp4.json").read_bytes())
    reports.write(tmp_path / "reports", {"rank": 0, "group": "tp0.ranks0-1.node-1-000000-0", "calls": {"ONESHOT": 1}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(NodeTopology, "detect", lambda: NodeTopology.from_json(NODE))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no profile of whoever runs the tests
    monkeypatch.setenv("COLUMNS", "120")
    for name in os.environ:
        if name.startswith(("LLM_ALLREDUCE_", "NCCL_")) or name == "CUDA_VISIBLE_DEVICES":
            monkeypatch.delenv(name)


def _try(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command that is done at once, whose output must be the shown one; parses any other."""
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    _, name, *arguments = [*command.words, "--help"][: max(2, len(command.words))]
    if name.startswith("-"):
        return
    assert name in known, str(command)
    if name not in RUN or _has_placeholder(command) or (name == "breakeven" and "--from" not in arguments):
        if not _has_placeholder(command):
            known[name].make_context(name, list(arguments))
        return
    for variable, value in command.variables.items():
        monkeypatch.setenv(variable, value)
    result = CliRunner().invoke(app, [name, *arguments])
    assert result.exit_code == 0, f"{command}: {result.output}"
    for shown in command.output:
        assert _matches(shown, result.output.splitlines()), f"{command}: {shown!r} is not in\n{result.output}"


@pages
@pytest.mark.usefixtures("node")
def test_commands_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(page, "llm-allreduce"):
        with monkeypatch.context() as context:
            _try(command, context)


@pages
def test_options_of_commands_exist(page: Path) -> None:
    """In prose, too, where a command stands without values."""
    known_commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, rest in re.findall(r"llm-allreduce ([a-z]+)([^`#|\n]*)", page.read_text()):
        assert name in known_commands, f"{page.name}: llm-allreduce {name}"
        parameters = known_commands[name].params
        known = {option for parameter in parameters for option in [*parameter.opts, *parameter.secondary_opts]}
        used = set(re.findall(r"(?:^|\s)(--?[a-z][a-z_-]*)", rest))
        assert used <= known | {"--help"}, f"{page.name}: llm-allreduce {name} {used - known}"


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("name", typer.main.get_command(app).commands)  # type: ignore[attr-defined]
def test_examples_of_help_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    epilog = typer.main.get_command(app).commands[name].epilog  # type: ignore[attr-defined]
    examples = [line[2:] for line in epilog.splitlines() if line.startswith("- llm-allreduce ")]
    assert examples
    for line in examples:
        for part in re.split(r";|  \(", line):
            words = part.split(">")[0].split()
            if words and words[0] == "llm-allreduce":
                _try(Command({}, tuple(words)), monkeypatch)


SCREEN = 50  # lines of a terminal that is 120 characters wide


@pytest.mark.parametrize("name", ["", *typer.main.get_command(app).commands])  # type: ignore[attr-defined]
def test_help_fits_a_screen(name: str) -> None:
    result = CliRunner().invoke(app, [*filter(None, [name]), "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert len(result.output.splitlines()) <= SCREEN, result.output
