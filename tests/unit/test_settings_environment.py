"""Which environment variables are settings, which are somebody else's, and which are settings misspelled."""

from __future__ import annotations

import logging
import os
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import AllReduceConfig, ConfigError, load_config
from llm_allreduce_plugin.config import ENV_PREFIX, environment_table
from llm_allreduce_plugin.diagnosis import software
from llm_allreduce_plugin.diagnosis.finding import Verdict

VARIABLES = [variable for variable, _ in environment_table()]


def settings_in(environment: dict[str, str]) -> AllReduceConfig:
    others = {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}
    with mock.patch.dict(os.environ, others | environment, clear=True):
        return load_config()


def kubernetes_links(service: str, host: str, ports: dict[str, tuple[int, str]]) -> dict[str, str]:
    """What kubelet gives every container of the namespace about a service, Docker's form of links included.

    https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    name = service.upper().replace("-", "_")
    address = f"[{host}]" if ":" in host else host
    first, protocol = next(iter(ports.values()))
    found = {
        f"{name}_SERVICE_HOST": host,
        f"{name}_SERVICE_PORT": str(first),
        f"{name}_PORT": f"{protocol}://{address}:{first}",
    }
    for port_name, (port, protocol) in ports.items():
        if port_name:
            found[f"{name}_SERVICE_PORT_{port_name.upper().replace('-', '_')}"] = str(port)
        prefix = f"{name}_PORT_{port}_{protocol.upper()}"
        found |= {
            prefix: f"{protocol}://{address}:{port}",
            f"{prefix}_PROTO": protocol,
            f"{prefix}_PORT": str(port),
            f"{prefix}_ADDR": host,
        }
    return found


SERVICE_NAMES = st.from_regex(r"llm-allreduce(-[a-z0-9]([a-z0-9-]{0,12}[a-z0-9])?)?", fullmatch=True)
PORT_NAMES = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
PORTS = st.tuples(st.integers(1, 65535), st.sampled_from(["tcp", "udp", "sctp"]))
HOSTS = st.ip_addresses().map(str)


@given(SERVICE_NAMES, HOSTS, st.dictionaries(PORT_NAMES, PORTS, min_size=1, max_size=3))
def test_service_links_keep_no_server_from_starting(service: str, host: str, ports: dict[str, tuple[int, str]]) -> None:
    assert settings_in(kubernetes_links(service, host, ports)) == AllReduceConfig()


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_service_called_like_a_setting(variable: str) -> None:
    """``llm-allreduce-transport`` and the like: names close to settings, and still links by what they hold."""
    links = kubernetes_links(variable.lower().replace("_", "-"), "10.0.171.239", {"": (8000, "tcp")})
    assert settings_in(links | {"LLM_ALLREDUCE_TIMEOUT_S": "7"}) == AllReduceConfig(timeout_s=7)


def test_the_service_of_the_report() -> None:
    environment = {
        "LLM_ALLREDUCE_SERVICE_HOST": "10.0.0.11",
        "LLM_ALLREDUCE_SERVICE_PORT": "8000",
        "LLM_ALLREDUCE_SERVICE_PORT_HTTP": "8000",
        "LLM_ALLREDUCE_PORT": "tcp://10.0.0.11:8000",
        "LLM_ALLREDUCE_PORT_8000_TCP": "tcp://10.0.0.11:8000",
        "LLM_ALLREDUCE_PORT_8000_TCP_PROTO": "tcp",
        "LLM_ALLREDUCE_PORT_8000_TCP_PORT": "8000",
        "LLM_ALLREDUCE_PORT_8000_TCP_ADDR": "10.0.0.11",
    }
    assert settings_in(environment) == AllReduceConfig()


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("LLM_ALLREDUCE_STRATEGIE", "LLM_ALLREDUCE_STRATEGY"),
        ("LLM_ALLREDUCE_TIMEOUT", "LLM_ALLREDUCE_TIMEOUT_S"),
        ("LLM_ALLREDUCE_TIMEOUT_MS", "LLM_ALLREDUCE_TIMEOUT_S"),
        ("LLM_ALLREDUCE_ALLREDUCE_STRATEGY", "LLM_ALLREDUCE_STRATEGY"),
        ("LLM_ALLREDUCE_WORKSPACE", "LLM_ALLREDUCE_WORKSPACE_BYTES"),
        ("LLM_ALLREDUCE_WORKSPACE_SIZE", "LLM_ALLREDUCE_WORKSPACE_BYTES"),
        ("LLM_ALLREDUCE_PROFILE", "LLM_ALLREDUCE_TUNING_PROFILE"),
        ("LLM_ALLREDUCE_ONESHOT_MAX_BYTES", "LLM_ALLREDUCE_ONE_SHOT_MAX_BYTES"),
        ("LLM_ALLREDUCE_LOWPRECISION", "LLM_ALLREDUCE_LOW_PRECISION"),
        ("LLM_ALLREDUCE_LOW_PRECISION__WIRE_FORMAT", "LLM_ALLREDUCE_LOW_PRECISION"),
        ("LLM_ALLREDUCE_WIRE_FORMAT", "LLM_ALLREDUCE_LOW_PRECISION"),
        ("LLM_ALLREDUCE_REPORTS_DIR", "LLM_ALLREDUCE_REPORT_DIR"),
        ("LLM_ALLREDUCE_CONFIG_FILE", "LLM_ALLREDUCE_CONFIG"),
        ("LLM_ALLREDUCE_TRANSPORTS", "LLM_ALLREDUCE_TRANSPORT"),
        ("llm_allreduce_strategi", "LLM_ALLREDUCE_STRATEGY"),
        ("LLM_ALL_REDUCE_STRATEGY", "LLM_ALLREDUCE_STRATEGY"),
    ],
)
@pytest.mark.parametrize("value", ("ONESHOT", "", "8000"))
def test_a_misspelled_setting_is_an_error_with_its_suggestion(variable: str, meant: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_in({variable: value})
    assert f"environment: {variable}={value!r}: unknown key; allowed are " in str(caught.value)
    assert str(caught.value).endswith(f"; did you mean {meant}?")


@given(st.sampled_from(VARIABLES), st.data())
def test_one_wrong_letter_is_a_misspelling(variable: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(len(ENV_PREFIX), len(variable) - 1))
    letter = data.draw(st.sampled_from("ABCXYZ_"))
    wrong = data.draw(
        st.sampled_from((variable[:at] + letter + variable[at + 1 :], variable[:at] + letter + variable[at:]))
    )
    if wrong in VARIABLES:
        return
    with pytest.raises(ConfigError, match="did you mean"):
        settings_in({wrong: "x"})


FOREIGN = ("VERSION", "HOME", "IMAGE", "IMAGE_TAG", "NAMESPACE", "LOG_LEVEL", "POD_IP", "HOST", "PORT", "URL", "TOKEN")
FOREIGN += ("COMMIT", "REPO", "ROOT", "NAME", "ENV_PATH", "SERVICE_HOST", "DEBUG", "REPLICAS", "MODEL", "CACHE_DIR")


@pytest.mark.parametrize("name", FOREIGN)
def test_others_variables_are_named_in_the_log_and_stop_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    from llm_allreduce_plugin.config import _warn_of

    _warn_of.cache_clear()
    variable, secret = f"LLM_ALLREDUCE_{name}", "hunter2.example"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert settings_in({variable: secret, "LLM_ALLREDUCE_STAGED": "on"}).staged == "on"
    said = [record.getMessage() for record in caplog.records if variable in record.getMessage()]
    assert len(said) == 1, "once"
    assert secret not in said[0], "what is not ours may be a secret"


def test_check_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> list[Any]:
        return [finding for finding in software.variables() if "LLM_ALLREDUCE" in finding.text]

    monkeypatch.setenv("LLM_ALLREDUCE_SERVICE_HOST", "10.0.0.1")
    assert software.settings()[0].verdict is Verdict.OK
    assert not lines()
    monkeypatch.setenv("LLM_ALLREDUCE_VERSION", "1.2")
    assert software.settings()[0].verdict is Verdict.OK
    assert [(line.verdict, "LLM_ALLREDUCE_VERSION" in line.text) for line in lines()] == [(Verdict.WARN, True)]
    monkeypatch.setenv("LLM_ALLREDUCE_STRATEGIE", "NCCL")
    assert software.settings()[0].verdict is Verdict.FAIL
    assert not lines()


@pytest.mark.parametrize("spell", (str.upper, str.lower, str.title), ids=("upper", "lower", "title"))
def test_names_count_in_any_case(spell: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text("timeout_s: 5\nstaged: on\n")
    environment = {
        spell("LLM_ALLREDUCE_CONFIG"): str(tmp_path / "a.yaml"),
        spell("LLM_ALLREDUCE_STRATEGY"): "twoshot",
        spell("LLM_ALLREDUCE_CUDA_ARCHS"): "90",
        spell("LLM_ALLREDUCE_TIMEOUT_S"): "6",
    }
    expected = {"allreduce_strategy": "TWOSHOT", "timeout_s": 6, "staged": "on"}
    assert settings_in(environment) == AllReduceConfig(**expected)  # type: ignore[arg-type]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(tmp_path / "a.yaml") in software.settings()[0].text


def test_two_spellings_of_one_variable() -> None:
    same = {"LLM_ALLREDUCE_TIMEOUT_S": "5", "llm_allreduce_timeout_s": "5"}
    assert settings_in(same).timeout_s == 5
    assert settings_in(same | {"LLM_ALLREDUCE_TIMEOUT_S": ""}).timeout_s == 5, "an empty one is unset"
    with pytest.raises(ConfigError, match="LLM_ALLREDUCE_TIMEOUT_S='6' and llm_allreduce_timeout_s='5': two spellings"):
        settings_in(same | {"LLM_ALLREDUCE_TIMEOUT_S": "6"})


ENVIRONMENT_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60) | st.binary(
    max_size=20
).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))
NAMES = st.sampled_from([*VARIABLES, *map(str.lower, VARIABLES)]) | st.from_regex(
    r"LLM_ALLREDUCE_[A-Z_]{1,20}", fullmatch=True
)


@given(st.dictionaries(NAMES, ENVIRONMENT_TEXT | st.sampled_from(["5", "on", "{}", '{"domains": [0, 1]}']), max_size=4))
def test_any_environment_is_settings_or_a_config_error(environment: dict[str, str]) -> None:
    try:
        config = settings_in(environment)
    except ConfigError as error:
        assert "environment" in str(error) or "file" in str(error)
        str(error).encode("utf-8")
    else:
        assert isinstance(config, AllReduceConfig)
        config.model_dump_json()  # as ranks compare it
