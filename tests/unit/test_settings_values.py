"""What settings may hold: kinds that are not mixed up, bounds, sizes and paths, for every field there is or will be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from llm_allreduce_plugin import AllReduceConfig, ConfigError, LlmArgs, load_config
from llm_allreduce_plugin.base.validation import shown
from llm_allreduce_plugin.cli.options import parse_bytes
from llm_allreduce_plugin.config import LowPrecisionConfig

NESTED = {"low_precision": LowPrecisionConfig}


def kinds_of(annotation: object) -> set[object]:
    """The types in an annotation."""
    return {annotation}.union(*(kinds_of(part) for part in get_args(annotation) if not isinstance(part, str)))


def fields_of(*wanted: type, model: type[BaseModel] = AllReduceConfig, path: tuple[str, ...] = ()) -> list[Any]:
    """The paths of all fields that hold one of these types, nested ones too."""
    found = []
    for name, field in model.model_fields.items():
        if name in NESTED:
            found += fields_of(*wanted, model=NESTED[name], path=(name,))
        elif kinds_of(field.annotation) & set(wanted):
            found.append((*path, name))
    return found


def is_list(path: tuple[str, ...]) -> bool:
    return path[-1] == "domains"


def at(path: tuple[str, ...], value: object) -> dict[str, Any]:
    """Settings in which one field has a value; lists of it where the field is a list."""
    inner = [value, value] if is_list(path) else value
    for part in reversed(path):
        inner = {part: inner}
    assert isinstance(inner, dict)
    return inner


NUMBERS = fields_of(int, float)
SWITCHES = fields_of(bool)
PATHS = fields_of(Path)


def as_yaml(value: object) -> str:
    """As a person writes it: booleans bare, so that YAML's own reading of them is tried."""
    import yaml

    return yaml.safe_dump(value)


@pytest.fixture(params=("engine", "yaml", "json"))
def load(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings through one of the sources that has types of its own."""

    def through(settings: dict[str, Any]) -> AllReduceConfig:
        if request.param == "engine":
            return load_config(settings)
        path = tmp_path / f"settings.{request.param}"
        path.write_text(as_yaml(settings) if request.param == "yaml" else json.dumps(settings))
        monkeypatch.setenv("LLM_ALLREDUCE_CONFIG", str(path))
        return load_config()

    return through


def test_the_fields_are_found() -> None:
    assert {("timeout_s",), ("workspace_bytes",), ("low_precision", "domains")} <= set(NUMBERS)
    assert ("in_band",) in SWITCHES
    assert {("report_dir",), ("tuning_profile",)} <= set(PATHS)


@pytest.mark.parametrize("field", NUMBERS, ids=".".join)
@pytest.mark.parametrize("value", (True, False))
def test_a_boolean_is_no_number(load: Any, field: tuple[str, ...], value: bool) -> None:
    with pytest.raises(ConfigError, match=rf"{field[-1]}.*{value}.*must not be a boolean"):
        load(at(field, value))


@pytest.mark.parametrize("field", SWITCHES, ids=".".join)
@pytest.mark.parametrize("value", (1, 0, 1.0, 0.0, 2))
def test_a_number_is_no_boolean(load: Any, field: tuple[str, ...], value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{field[-1]}.*{value}.*must be true or false"):
        load(at(field, value))


@pytest.mark.parametrize("field", [(name,) for name in AllReduceConfig.model_fields], ids=".".join)
def test_no_field_takes_a_boolean_for_something_else(load: Any, field: tuple[str, ...]) -> None:
    if field[0] in ("staged", "multicast", *(path[0] for path in SWITCHES)):
        load(at(field, True))
        return
    with pytest.raises(ConfigError, match=f"{field[0]}=(True|False)"):
        load(at(field, False))


def test_text_says_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, value in (("on", True), ("0", False), ("yes", True), ("False", False)):
        monkeypatch.setenv("LLM_ALLREDUCE_IN_BAND", text)
        assert load_config().in_band is value


@pytest.mark.parametrize("field", NUMBERS, ids=".".join)
@pytest.mark.parametrize("text", ("9" * 500, "9" * 5000, str(2**63), "1e300"))
def test_numbers_have_upper_bounds(field: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(at(field, text))
    assert field[-1] in str(caught.value)
    assert len(str(caught.value)) < 2000
    if text != "1e300":
        with pytest.raises(ConfigError, match=field[-1]):
            load_config(at(field, 10 ** (len(text) - 1)))


def test_domains_are_few_and_small() -> None:
    for domains in ([0, 2**31], [0, 1024], [0] * 1025):
        with pytest.raises(ConfigError, match=r"low_precision\.domains"):
            load_config({"low_precision": {"domains": domains}})
    assert load_config({"low_precision": {"domains": [0, 1023]}}).low_precision.domains == (0, 1023)


@pytest.mark.parametrize(
    "field", [*NUMBERS, *PATHS, *SWITCHES, ("transport",), ("staged",), ("multicast",), ("allreduce_strategy",)]
)
@pytest.mark.parametrize("value", ([[]], {"a": 1}, b"\xff", object(), {1, 2}), ids=lambda value: type(value).__name__)
def test_other_kinds_are_refused_in_words(field: tuple[str, ...], value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(at(field, value))
    assert field[-1] in str(caught.value)
    for internal in ("lax-or-strict", "function-", "literal["):
        assert internal not in str(caught.value)


# -- sizes -------------------------------------------------------------------------------------------------------------

SIZES = [path for path in NUMBERS if path[-1].endswith("_bytes")]


@given(st.integers(2, 1024), st.sampled_from(["", "K", "M", "G"]), st.sampled_from(["", "i", "iB"]), st.data())
def test_a_size_means_the_same_everywhere(number: int, unit: str, rest: str, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(["", " "])) + unit + (rest if unit else data.draw(st.sampled_from(["", "B"])))
    text = f"{number}{data.draw(st.sampled_from([suffix.upper(), suffix.lower(), suffix]))}"
    expected = number * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[unit]
    assert parse_bytes("--bytes", text) == expected
    settings = {"one_shot_max_bytes": text, "low_precision": {"min_bytes": text}}
    assert load_config(settings).one_shot_max_bytes == expected
    assert load_config(settings).low_precision.min_bytes == expected
    if 2 << 20 <= expected <= 8 << 30:
        assert load_config({"workspace_bytes": text}).workspace_bytes == expected


@pytest.mark.parametrize(
    "text", ("64MB", "64 kb", "1GB", "1.5M", "-1", "0x10", "1_000", "64iB", "M", "", " ", "\u0661")
)
def test_what_is_no_size_is_none_anywhere(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_bytes("--bytes", text)
    for field in SIZES:
        with pytest.raises(ConfigError, match=f"{field[-1]}.*must be a whole number of bytes"):
            load_config(at(field, text))


def test_a_size_with_two_meanings_says_which_to_write() -> None:
    with pytest.raises(ConfigError, match=r"workspace_bytes='64MB': .*write MiB \(or M\) for powers of 1024"):
        load_config({"workspace_bytes": "64MB"})


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", PATHS, ids=".".join)
def test_home_folders_are_expanded_in_every_path(
    field: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given_, meant in (("~/x.json", tmp_path / "x.json"), ("~", tmp_path), ("a/~", Path("a/~"))):
        assert getattr(load_config({field[0]: given_}), field[0]) == meant
        assert getattr(AllReduceConfig(**{field[0]: given_}), field[0]) == meant  # type: ignore[arg-type]
        monkeypatch.setenv(f"LLM_ALLREDUCE_{field[0].upper()}", given_)
        assert getattr(load_config(), field[0]) == meant
        monkeypatch.delenv(f"LLM_ALLREDUCE_{field[0].upper()}")
    root = Path("~root").expanduser()
    assert getattr(load_config({field[0]: "~root/x"}), field[0]) == root / "x"


@pytest.mark.parametrize("field", PATHS, ids=".".join)
@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("~nosuchuser/x", "~nosuchuser is no home folder"),
        ("", "must be"),
        ("  ", "must be"),
        ("a\0b", "null byte"),
        ("a\udcff", "UTF-8"),
        (5, "must be a path"),
        (False, "must not be a boolean"),
        (b"/a", "must be a path"),
    ],
)
def test_what_is_no_path(field: tuple[str, ...], value: object, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{field[0]}=.*{why}"):
        load_config({field[0]: value})


def test_the_settings_file_is_a_path_like_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text("timeout_s: 7\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLM_ALLREDUCE_CONFIG", "~/a.yaml")
    assert load_config().timeout_s == 7
    monkeypatch.setenv("LLM_ALLREDUCE_CONFIG", "~nosuchuser/a.yaml")
    with pytest.raises(ConfigError, match=r"environment: LLM_ALLREDUCE_CONFIG='~nosuchuser/a\.yaml': .*no home folder"):
        load_config()
    monkeypatch.setenv("LLM_ALLREDUCE_CONFIG", "  ")
    with pytest.raises(ConfigError, match=r"LLM_ALLREDUCE_CONFIG='  ': must be a path"):
        load_config()
    monkeypatch.setenv("LLM_ALLREDUCE_CONFIG", "")
    assert load_config() == AllReduceConfig()


def test_an_empty_variable_is_unset_for_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AllReduceConfig.model_fields:
        monkeypatch.setenv(f"LLM_ALLREDUCE_{name.removeprefix('allreduce_').upper()}", "")
    assert load_config() == AllReduceConfig()
    assert not load_config().model_fields_set


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without a passwd entry, and HOME not set."""
    import pwd

    def unknown(_uid: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ConfigError, match="report_dir='~/x': .*~ is no home folder"):
        load_config({"report_dir": "~/x"})


# -- what is shown of a value ------------------------------------------------------------------------------------------


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    )
)
def test_what_is_shown_is_short(value: object) -> None:
    assert len(shown({"a": [value] * 100})) < 50_000


def test_what_is_shown_of_large_values_is_short() -> None:
    for large in ("x" * 10**6, 10**5000, -(10**5000), list(range(10**6)), b"x" * 10**6, Path("x" * 10**6)):
        assert len(shown(large)) < 200


def test_what_holds_itself_is_shown_and_refused() -> None:
    knot: list[Any] = []
    knot.append(knot)
    loop: dict[str, Any] = {}
    loop["low_precision"] = loop
    for value in ({"low_precision": knot}, {"timeout_s": knot}, loop):
        with pytest.raises(ConfigError):
            load_config(value)


# -- LlmArgs -----------------------------------------------------------------------------------------------------------


def test_nothing_given_overrides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ALLREDUCE_STRATEGY", "TWOSHOT")
    for arguments in (LlmArgs(), LlmArgs(allreduce={}), LlmArgs(allreduce={"timeout_s": 5})):  # type: ignore[arg-type]
        sent = arguments.vllm_kwargs()["additional_config"]["allreduce"]
        assert "allreduce_strategy" not in sent
        assert load_config(sent).allreduce_strategy == "TWOSHOT"
    given_ = LlmArgs(allreduce_strategy="AUTO").vllm_kwargs()["additional_config"]["allreduce"]  # type: ignore[arg-type]
    assert load_config(given_).allreduce_strategy == "AUTO"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"allreduce_strategy": "quick"}, "LlmArgs: allreduce_strategy='quick': must be one of AUTO"),
        (
            {"strategy": "ONESHOT"},
            "LlmArgs: strategy='ONESHOT': unknown key; allowed are allreduce_strategy, allreduce",
        ),
        ({"allreduce": {"timeout": 3}}, "LlmArgs: allreduce.timeout=3: unknown key; allowed are allreduce_strategy, "),
        ({"allreduce": {"timeout": 3}}, "did you mean timeout_s?"),
        ({"allreduce": {"timeout_s": -1}}, "LlmArgs: allreduce.timeout_s=-1: input should be greater than 0"),
        ({"allreduce": {"low_precision": {"domains": [0, True]}}}, "LlmArgs: allreduce.low_precision.domains.1=True"),
        ({"allreduce": "ONESHOT"}, "LlmArgs: allreduce='ONESHOT'"),
        ({"allreduce": {1: 2}}, "LlmArgs: key allreduce.1: must be text"),
    ],
)
def test_wrong_arguments_are_config_errors(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LlmArgs(**arguments)
    assert text in str(caught.value)


def test_spellings_of_one_strategy_do_not_contradict() -> None:
    for name in ("oneshot", " OneShot "):
        arguments = LlmArgs(allreduce_strategy=name, allreduce={"allreduce_strategy": "ONESHOT"})  # type: ignore[arg-type]
        assert arguments.allreduce_config().allreduce_strategy == "ONESHOT"
    minimal = LlmArgs(allreduce_strategy="min_latency", allreduce={"allreduce_strategy": "MINLATENCY"})  # type: ignore[arg-type]
    assert minimal.allreduce_config().allreduce_strategy == "MINLATENCY"
