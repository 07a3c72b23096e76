"""Settings as YAML and JSON: whatever a file or text holds gives settings or a ConfigError that names it, soon."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_allreduce_plugin import AllReduceConfig, ConfigError, load_config
from llm_allreduce_plugin.config import LowPrecisionConfig
from tests.support.forks import Forks

MOST_SECONDS = 10.0  # for any file; a rank that reads one on a busy machine


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | bytes], AllReduceConfig]:
    """Settings from a file with this name and content."""

    def through(name: str, content: str | bytes) -> AllReduceConfig:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setenv("LLM_ALLREDUCE_CONFIG", str(path))
        return load_config()

    return through


Load = Callable[[str, "str | bytes"], AllReduceConfig]


# -- files that are none -----------------------------------------------------------------------------------------------

READ = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    load_config()
except ConfigError as error:
    print("ConfigError:", error)
else:
    print("read")
"""


def poisoned(folder: Path, kind: str, suffix: str) -> tuple[Path, str]:
    """A file of this kind, and what is said about it."""
    path = folder / f"settings{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
        return path, "not a regular file"
    if kind == "folder":
        path.mkdir()
        return path, "not a regular file"
    if kind == "endless":
        path.symlink_to("/dev/zero")
        return path, "not a regular file"
    if kind == "terminal":
        path.symlink_to("/dev/tty")
        return path, "cannot be read"
    if kind == "loop":
        path.symlink_to(path)
        return path, "cannot be read: Too many levels of symbolic links"
    if kind == "large":
        with path.open("wb") as file:
            file.truncate(50 << 30)
        return path, "larger than 1048576 bytes"
    if kind == "utf16":
        path.write_text("timeout_s: 5\n", encoding="utf-16")
        return path, "not UTF-8 text"
    assert kind == "binary"
    path.write_bytes(bytes(range(256)) * 10)
    return path, "not UTF-8 text"


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks("from llm_allreduce_plugin import ConfigError, load_config")
    yield forks
    forks.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", (".yaml", ".yml", ".json"))
@pytest.mark.parametrize("kind", ("pipe", "folder", "endless", "terminal", "loop", "large", "utf16", "binary"))
def test_poisoned_files(kind: str, suffix: str, tmp_path: Path, forks: Forks) -> None:
    """In a process of their own with 2 GiB: the faults looked for hang, or take all memory."""
    path, reason = poisoned(tmp_path, kind, suffix)
    code, said = forks.run(READ, LLM_ALLREDUCE_CONFIG=str(path))
    assert code == 0, said[-2000:]
    assert said.startswith(f"ConfigError: file {path}: "), said
    assert reason in said
    assert "LLM_ALLREDUCE_CONFIG" in said


# -- documents that say too much ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.yaml", "timeout_s: 5\nstaged: on\ntimeout_s: 6\n", ["key 'timeout_s' is given twice, in lines 1 and 3"]),
        ("a.yaml", "low_precision: {algorithm: ring, algorithm: auto}", ["key 'algorithm' is given twice"]),
        ("a.yaml", '"timeout_s": 5\ntimeout_s: 5', ["key 'timeout_s' is given twice"]),
        ("a.json", '{"timeout_s": 5, "timeout_s": 6}', ["key 'timeout_s' is given twice"]),
        ("a.json", '{"low_precision": {"domains": [0, 1], "domains": [1, 0]}}', ["key 'domains' is given twice"]),
        ("a.yaml", 'low_precision: \'{"algorithm": 1, "algorithm": 2}\'', ["key 'algorithm' is given twice"]),
        ("a.yaml", "1: x", ["line 1: a key must be text"]),
        ("a.yaml", "timeout_s: 5\non: 1", ["line 2: a key must be text"]),
        ("a.yaml", "? [a, b]\n: 1", ["line 1: a key must be text"]),
        ("a.yaml", "null: 1", ["a key must be text"]),
        ("a.yaml", "low_precision: {1: 2}", ["a key must be text"]),
        ("a.yaml", "timeout_s: yes", ["timeout_s=True", "must not be a boolean (YAML reads yes"]),
        ("a.yaml", "low_precision: {domains: [no, yes]}", ["low_precision.domains.0=False", "not be a boolean"]),
        ("a.yaml", "one_shot_max_bytes: no", ["one_shot_max_bytes=False", "not be a boolean"]),
        ("a.yaml", "tuning_profile: no", ["tuning_profile=False", "not be a boolean"]),
        ("a.yaml", "one_shot_max_bytes: " + "9" * 500, ["one_shot_max_bytes=<number of 1661 bits>", "1099511627776"]),
        ("a.yaml", "one_shot_max_bytes: " + "9" * 5000, ["digits"]),
        ("a.json", '{"one_shot_max_bytes": ' + "9" * 5000 + "}", ["not valid JSON", "digits"]),
        ("a.yaml", "timeout_s: 1:30", ["timeout_s='1:30'", "number"]),
        ("a.yaml", "timeout_s: 2001-01-01", ["timeout_s='2001-01-01'", "number"]),
        ("a.yaml", "timeout_s: .inf", ["timeout_s=inf", "finite"]),
        ("a.json", '{"timeout_s": NaN}', ["timeout_s=nan", "finite"]),
        ("a.yaml", "a: &x [1]\nb: *x", ["line 2: alias *x: aliases are not supported"]),
        ("a.yaml", "low_precision: &x {algorithm: *x}", ["alias *x"]),
        ("a.yaml", "<<: {timeout_s: 5}", ["<<={'timeout_s': 5}", "unknown key"]),
        ("a.yaml", "timeout_s: !!float yes", ["line 1: tag tag:yaml.org,2002:float: tags are not supported"]),
        ("a.yaml", "timeout_s: !!bool perhaps", ["tags are not supported"]),
        ("a.yaml", "timeout_s: !!timestamp soon", ["tags are not supported"]),
        ("a.yaml", "timeout_s: !!int ''", ["tags are not supported"]),
        ("a.yaml", "!!python/object/apply:os.system ['false']", ["tags are not supported"]),
        ("a.yaml", "timeout_s: !seconds 5", ["tag !seconds: tags are not supported"]),
        ("a.yaml", "timeout_s: 5\n---\ntimeout_s: 6", ["not valid YAML"]),
        ("a.yaml", "timeout_s: 5\0", ["not valid YAML"]),
        ("a.yaml", "", ["holds None: must be a mapping"]),
        ("a.yaml", "[" * 100_000, ["nested more than 16 levels deep"]),
        ("a.yaml", "{a: " * 5_000, ["nested more than 16 levels deep"]),
        ("a.yaml", "- " * 5_000, ["nested more than 16 levels deep"]),
        ("a.yaml", "low_precision: " + "[" * 20 + "]" * 20, ["nested more than 16 levels deep"]),
        ("a.json", '{"a":' * 100_000, ["nested more than 16 levels deep"]),
        ("a.json", "[" * 500_000 + "]" * 500_000, ["nested more than 16 levels deep"]),
        ("a.json", "[" * 18 + "]" * 18, ["nested more than 16 levels deep"]),
        ("a.yaml", "x:\n" + "- 1\n" * 200_000, ["more than 10000 values"]),
        ("a.yaml", "low_precision: '" + "[" * 100_000 + "'", ["low_precision=", "nested too deeply"]),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_is_refused(load: Load, name: str, text: str, parts: list[str]) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load(name, text)
    assert time.monotonic() - started < MOST_SECONDS
    for part in [f"{name}: ", *parts]:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_aliases_that_explode(load: Load) -> None:
    """A billion values in 500 bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match="alias"):
        load("a.yaml", "\n".join(lines))


@pytest.mark.parametrize(
    "text",
    [
        "'" + "x" * 1_000_000,
        "timeout_s: " + "5 " * 500_000,
        "? " * 300_000,
        "!" * 1_000_000,
        "&" + "a" * 1_000_000 + " 1",
        "%YAML " * 150_000,
        "# \n" * 300_000,
        "timeout_s: |\n" + " x\n" * 300_000,
        "x" * 1_000_000 + ": 5",
        "timeout_s: 1" + ":59" * 300_000,
        "timeout_s: 0x" + "f" * 900_000,
        "\t" * 1_000_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_large_documents_end_soon(load: Load, text: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load("a.yaml", text)
    assert time.monotonic() - started < MOST_SECONDS
    assert len(str(caught.value)) < 3000


def test_what_is_taken(load: Load) -> None:
    assert load("a.yaml", b"\xef\xbb\xbftimeout_s: 5\n").timeout_s == 5, "a byte order mark"
    assert load("a.yaml", "staged: on").staged == "on"
    assert load("a.yaml", "staged: 'OFF'").staged == "off"
    assert load("a.yaml", "in_band: no").in_band is False
    assert load("a.yaml", "in_band: 'no'").in_band is False
    assert load("a.yaml", "workspace_bytes: 0x400000").workspace_bytes == 4 << 20
    assert load("a.yaml", "workspace_bytes: 4_194_304").workspace_bytes == 4 << 20
    assert load("a.yaml", "workspace_bytes: null").workspace_bytes is None
    assert load("a.yaml", "timeout_s: 1.5e2").timeout_s == 150
    assert load("a.yaml", "timeout_s: &patience 5").timeout_s == 5
    assert load("a.yaml", "---\ntimeout_s: 5\n...\n").timeout_s == 5
    assert load("a.yaml", "low_precision:\n  domains: [0, 0, 1, 1]\n").low_precision.domains == (0, 0, 1, 1)
    assert load("a.yaml", "tuning_profile: None").tuning_profile == "none"
    assert load("a.yaml", "report_dir: 'no'").report_dir == Path("no")


# -- any input ---------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from([*AllReduceConfig.model_fields, *LowPrecisionConfig.model_fields])
WORDS = st.sampled_from(
    ["AUTO", "on", "64M", "~", "~nosuchuser", "none", "fp8", "5", "1e9", "nan", "", "\0", "9" * 400]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | WORDS
VALUES = st.recursive(
    SCALARS | st.integers(-1, 5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(KEYS | st.text(max_size=8), VALUES, max_size=4) | VALUES
any_input = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def gives_settings_or_config_error(make: Callable[[], AllReduceConfig]) -> None:
    try:
        config = make()
    except ConfigError as error:
        assert len(str(error)) < 100_000
    else:
        assert isinstance(config, AllReduceConfig)
        config.model_dump_json()  # as ranks compare it


@any_input
@given(DOCUMENTS)
def test_any_yaml(load: Load, document: Any) -> None:
    text = yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "replace")
    gives_settings_or_config_error(lambda: load("a.yaml", text))


@any_input
@given(DOCUMENTS)
def test_any_json(load: Load, document: Any) -> None:
    gives_settings_or_config_error(lambda: load("a.json", json.dumps(document)))


MARKS = [
    ": ",
    "\n",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ", ",
    "? ",
    "!!int ",
    "!",
    "&a ",
    "*a",
    "|\n ",
    "---\n",
    "<<: ",
    "'",
    '"',
]
MARKS += ["\\", "%", "#", "@", "`", ">\n ", "\t", "  ", "0x", "1_", ".inf", "=", "~"]
YAML_TEXT = st.lists(KEYS | WORDS | st.sampled_from(MARKS), max_size=14).map("".join)


@any_input
@given(YAML_TEXT | st.text(max_size=40), st.sampled_from(["a.yaml", "a.json"]))
def test_any_text(load: Load, text: str, name: str) -> None:
    gives_settings_or_config_error(lambda: load(name, text.encode("utf-8", "replace")))


@any_input
@given(st.binary(max_size=60), st.sampled_from(["a.yaml", "a.json"]))
def test_any_bytes(load: Load, data: bytes, name: str) -> None:
    gives_settings_or_config_error(lambda: load(name, data))


OBJECTS = st.recursive(
    SCALARS
    | st.binary(max_size=4)
    | st.complex_numbers()
    | st.decimals()
    | st.dates()
    | st.just(object())
    | st.just(int),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS | st.integers() | st.booleans() | st.none() | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)


@any_input
@given(st.dictionaries(KEYS | st.integers() | st.none() | st.text(max_size=8), OBJECTS, max_size=4) | OBJECTS)
def test_any_engine_configuration(monkeypatch: pytest.MonkeyPatch, engine: Any) -> None:
    monkeypatch.delenv("LLM_ALLREDUCE_CONFIG", raising=False)
    gives_settings_or_config_error(lambda: load_config(engine))
