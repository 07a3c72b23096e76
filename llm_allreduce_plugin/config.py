"""Settings: what they are, where they come from, and what is said when one is wrong.

Four sources, later wins: defaults; a YAML or JSON file named by ``LLM_ALLREDUCE_CONFIG``; environment variables
``LLM_ALLREDUCE_*``; the engine's own configuration.
"""

from __future__ import annotations

import difflib
import enum
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError, create_model
from pydantic_settings import BaseSettings, SettingsConfigDict

from llm_allreduce_plugin.errors import ConfigError

ENV_PREFIX = "LLM_ALLREDUCE_"
CONFIG_FILE_VARIABLE = "LLM_ALLREDUCE_CONFIG"
# As a tuning profile: use none.
NO_PROFILE = "none"
# With the prefix, but not settings: the file's name, and what only the build reads.
_NOT_SETTINGS = {CONFIG_FILE_VARIABLE, "LLM_ALLREDUCE_CUDA_ARCHS", "LLM_ALLREDUCE_NVCC"}


class AllReduceStrategy(enum.StrEnum):
    """How the all-reduces of a tensor-parallel group are carried out. Names as in TensorRT-LLM."""

    AUTO = "AUTO"
    NCCL = "NCCL"
    UB = "UB"
    MINLATENCY = "MINLATENCY"
    ONESHOT = "ONESHOT"
    TWOSHOT = "TWOSHOT"
    LOWPRECISION = "LOWPRECISION"
    MNNVL = "MNNVL"

    @classmethod
    def parse(cls, value: object) -> AllReduceStrategy:
        """The strategy that ``value`` names, in any case; ``MIN_LATENCY`` is accepted too.

        Raises:
            ValueError: naming every strategy, when it names none. An unknown name is never taken for AUTO.
        """
        if isinstance(value, cls):
            return value
        allowed = ", ".join(cls)
        if not isinstance(value, str):
            message = f"must be a strategy name, one of {allowed}"
            raise ValueError(message)  # noqa: TRY004  (pydantic turns ValueError into a validation error)
        name = value.strip().upper()
        if name == "MIN_LATENCY":
            return cls.MINLATENCY
        try:
            return cls(name)
        except ValueError:
            message = f"must be one of {allowed}"
            raise ValueError(message) from None


class WireFormat(enum.StrEnum):
    """What LOWPRECISION sends values as; ``csrc/codec`` says what each is."""

    FP8 = "fp8"  # e4m3 and a scale for 496 values: 8.26 bits a value
    TQ3 = "tq3"  # three levels and a scale for 32 values: 2.5 bits a value
    HADAMARD2 = "hadamard2"  # rotated, four levels and a scale for 32 values: 2.5 bits a value, with less error


class LowPrecisionAlgorithm(enum.StrEnum):
    """How LOWPRECISION moves packets."""

    AUTO = "auto"  # hierarchical where it is for, otherwise two_shot
    TWO_SHOT = "two_shot"  # compressed both ways; two steps whatever the world size
    RING = "ring"  # from neighbour to neighbour: compressed while it is summed, then the rounded sums as they are
    HIERARCHICAL = "hierarchical"  # sums within two NUMA domains first; half as much crosses between them, or less


def _lower_case(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _parsed(value: object) -> object:
    """A mapping from text, as environment variables have it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        message = "must be a mapping of settings, as JSON in the environment"
        raise ValueError(message) from None


def _profile(value: object) -> object:
    """``none`` in any case, or a path."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        message = f"must be a file, or {NO_PROFILE}"
        raise ValueError(message)
    return NO_PROFILE if value.strip().lower() == NO_PROFILE else Path(value).expanduser()


class LowPrecisionConfig(BaseModel):
    """What LOWPRECISION does. Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    wire_format: Annotated[WireFormat, BeforeValidator(_lower_case)] = Field(
        default=WireFormat.FP8, description="what values are sent as"
    )
    algorithm: Annotated[LowPrecisionAlgorithm, BeforeValidator(_lower_case)] = Field(
        default=LowPrecisionAlgorithm.AUTO,
        description="how packets move; auto is hierarchical where GPUs without NVLink form two NUMA domains of equal "
        "size, otherwise two_shot",
    )
    domains: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=2,
        description="the domain of each rank, as numbers like [0, 0, 1, 1]; default: the NUMA node of its GPU",
    )
    min_bytes: ByteSize | None = Field(
        default=None, ge=0, description="smallest message per rank that is compressed; default: from where it pays"
    )


class TransportChoice(enum.StrEnum):
    """Which memory GPU ranks share."""

    AUTO = "auto"  # peers' GPU memory where all can reach it, else host memory
    PEER = "peer"
    HOST = "host"


class StagedChoice(enum.StrEnum):
    """Whether two-shot messages through peers' memory move in stages: at any time one stream out of a GPU, one in."""

    AUTO = "auto"  # large ones, where NVLink does not join the GPUs
    ON = "on"  # all
    OFF = "off"


def _switch(value: object) -> object:
    """YAML reads on and off as booleans."""
    return _lower_case({True: "on", False: "off"}[value] if isinstance(value, bool) else value)


Strategy = Annotated[AllReduceStrategy, BeforeValidator(AllReduceStrategy.parse)]


class AllReduceConfig(BaseModel):
    """Every setting of the plugin. Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    allreduce_strategy: Strategy = Field(
        default=AllReduceStrategy.AUTO, description="how all-reduces run; AUTO chooses among the exact strategies"
    )
    timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=86400,
        allow_inf_nan=False,
        description="seconds of GPU time (CPU ranks: of wall time) that a rank waits for a peer before it gives up",
    )
    first_timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=86400,
        allow_inf_nan=False,
        description="the same for the first calls, and for first calls of a new CUDA graph, before which ranks may "
        "compile for unequal times; never less than timeout_s",
    )
    start_timeout_s: float = Field(
        default=300.0,
        gt=0,
        le=86400,
        allow_inf_nan=False,
        description="seconds that a rank waits for the others in a step of the start",
    )
    transport: Annotated[TransportChoice, BeforeValidator(_lower_case)] = Field(
        default=TransportChoice.AUTO,
        description="GPUs: 'peer' for each other's memory (NVLink, PCIe peer access), 'host' for pinned host memory, "
        "'auto' for the first where it works and otherwise the second",
    )
    workspace_bytes: ByteSize | None = Field(
        default=None,
        ge=2 << 20,
        le=1 << 33,
        description="memory per rank through which messages of any size are passed in chunks, as a number or like "
        "'64MiB'; default 384 MiB of a GPU; 48 MiB of host memory for all GPUs together; 4 MiB on a CPU rank",
    )
    one_shot_max_bytes: ByteSize | None = Field(
        default=None,
        ge=0,
        description="AUTO: largest message per rank that goes to ONESHOT; default from a table per world size",
    )
    tuning_profile: Annotated[Path | Literal["none"] | None, BeforeValidator(_profile)] = Field(
        default=None,
        description="AUTO and MINLATENCY: file that `llm-allreduce tune` wrote, or 'none' for the package's tables; "
        "default: this node's in the cache folder, else a shipped one for its GPUs, else the tables",
    )
    in_band: bool = Field(
        default=True,
        description="GPUs: readiness travels inside the data, and a kernel may start while the one before drains; off: "
        "flags tell when data may be read, which is slower",
    )
    staged: Annotated[StagedChoice, BeforeValidator(_switch)] = Field(
        default=StagedChoice.AUTO,
        description="3 or more GPUs joined by PCIe peer access: TWOSHOT and LOWPRECISION keep each to one outbound "
        "and one inbound stream at a time; 'auto' for large messages where NVLink does not join all; 'on', 'off'",
    )
    low_precision: Annotated[LowPrecisionConfig, BeforeValidator(_parsed)] = Field(
        default=LowPrecisionConfig(),
        description="LOWPRECISION: wire_format (fp8, tq3, hadamard2), algorithm (auto, two_shot, ring, hierarchical), "
        "domains, min_bytes",
    )
    report_dir: Path | None = Field(
        default=None,
        description="folder in which every rank keeps rank-<r>.json: strategies, calls and reasons, about every second",
    )

    check_calls: bool = Field(
        default=False,
        description="before every call (captured ones when they are captured) ranks compare its size, type and launch, "
        "and name the first difference; for finding a fault, some milliseconds a call",
    )

    def check_world_size(self, world_size: int) -> None:
        """Check what depends on the number of ranks.

        Raises:
            ConfigError: naming the field, its value and what is allowed.
        """
        domains = self.low_precision.domains
        if domains is not None and len(domains) != world_size:
            message = (
                f"low_precision.domains={list(domains)}: has {len(domains)} numbers: must have one for each of the "
                f"{world_size} ranks"
            )
            raise ConfigError(message)


class LlmArgs(BaseModel):
    """The plugin's settings the way engine arguments are written.

    ``LLM(model, **LlmArgs(allreduce_strategy="ONESHOT").vllm_kwargs())``
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    allreduce_strategy: Strategy = AllReduceStrategy.AUTO
    allreduce: AllReduceConfig | None = Field(default=None, description="further settings; must not contradict")

    def allreduce_config(self) -> AllReduceConfig:
        """The settings as one object.

        Raises:
            ConfigError: ``allreduce`` names another strategy than ``allreduce_strategy``.
        """
        if self.allreduce is None:
            return AllReduceConfig(allreduce_strategy=self.allreduce_strategy)
        named_here = "allreduce_strategy" in self.model_fields_set
        named_there = "allreduce_strategy" in self.allreduce.model_fields_set
        if named_here and named_there and self.allreduce.allreduce_strategy != self.allreduce_strategy:
            message = (
                f"LlmArgs: allreduce_strategy={self.allreduce_strategy} but allreduce.allreduce_strategy="
                f"{self.allreduce.allreduce_strategy}: give one of them"
            )
            raise ConfigError(message)
        if named_here:
            return self.allreduce.model_copy(update={"allreduce_strategy": self.allreduce_strategy})
        return self.allreduce

    def vllm_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for ``vllm.LLM``."""
        settings = self.allreduce_config().model_dump(mode="json", exclude_unset=True)
        return {"additional_config": {"allreduce": settings}}


def _variable(field: str) -> str:
    """The environment variable of a field; the strategy's is ``LLM_ALLREDUCE_STRATEGY``."""
    return ENV_PREFIX + field.removeprefix("allreduce_").upper()


class _PrefixedSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True)


# The variables as text: what they may hold is judged together with the other sources, so that errors read alike.
_variables: dict[str, Any] = {
    _variable(name).removeprefix(ENV_PREFIX).lower(): (str | None, None) for name in AllReduceConfig.model_fields
}
_Environment = create_model("_Environment", __base__=_PrefixedSettings, **_variables)


def environment_table() -> list[tuple[str, str]]:
    """Every environment variable that is read at run time, with what it means."""
    rows = [(CONFIG_FILE_VARIABLE, "YAML or JSON file with the settings below")]
    rows += [(_variable(name), field.description or "") for name, field in AllReduceConfig.model_fields.items()]
    return rows


def _unknown_key(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown key; allowed are {', '.join(known)}{hint}"


def _validated(source: str, values: Mapping[str, Any], label: Mapping[str, str] | None = None) -> dict[str, Any]:
    """``values`` if every one of them is acceptable by itself.

    Raises:
        ConfigError: a line per fault with source, field, value and what is allowed.
    """
    try:
        AllReduceConfig(**values)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            path = [str(part) for part in fault["loc"]] or ["?"]
            nested = path[0] == "low_precision" and len(path) > 1
            fields = LowPrecisionConfig.model_fields if nested else AllReduceConfig.model_fields
            field = path[1] if nested else path[0]
            name = ".".join([(label or {}).get(path[0], path[0]), *path[1:]])
            if fault["type"] == "extra_forbidden":
                lines.append(f"{source}: {name}={fault['input']!r}: {_unknown_key(field, list(fields))}")
                continue
            allowed = fault["msg"].removeprefix("Value error, ")
            allowed = allowed[:1].lower() + allowed[1:]
            meaning = fields[field].description
            lines.append(f"{source}: {name}={fault['input']!r}: {allowed} ({meaning})")
        raise ConfigError("\n".join(lines)) from None
    return dict(values)


def _from_file(path: Path) -> dict[str, Any]:
    source = f"file {path}"
    parsers: dict[str, Any] = {".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    parse = parsers.get(path.suffix.lower())
    if parse is None:
        message = f"{source}: suffix {path.suffix!r}: must be one of {', '.join(parsers)} ({CONFIG_FILE_VARIABLE})"
        raise ConfigError(message)
    try:
        values = parse(path.read_text())
    except OSError as error:
        message = f"{source}: cannot be read: {error.strerror or error} ({CONFIG_FILE_VARIABLE})"
        raise ConfigError(message) from error
    except (ValueError, yaml.YAMLError) as error:
        message = f"{source}: not valid {path.suffix.lstrip('.').upper()}: {error}"
        raise ConfigError(message) from error
    if not isinstance(values, Mapping):
        message = f"{source}: holds {values!r}: must be a mapping of settings"
        raise ConfigError(message)
    return _validated(source, values)


def _from_environment() -> dict[str, Any]:
    variables = {_variable(name): name for name in AllReduceConfig.model_fields}
    for variable, value in os.environ.items():
        if variable.upper().startswith(ENV_PREFIX) and variable.upper() not in {*variables, *_NOT_SETTINGS}:
            message = f"environment: {variable}={value!r}: {_unknown_key(variable, sorted(variables))}"
            raise ConfigError(message)
    found = _Environment().model_dump(exclude_none=True)
    fields = {variable.removeprefix(ENV_PREFIX).lower(): name for variable, name in variables.items()}
    values = {fields[suffix]: text for suffix, text in found.items()}
    return _validated("environment", values, {name: variable for variable, name in variables.items()})


def _mapping(value: Any) -> Mapping[str, Any]:  # noqa: ANN401
    """A nested setting that was found valid, as a mapping of what it sets."""
    parsed = _parsed(value)
    if isinstance(parsed, LowPrecisionConfig):
        return parsed.model_dump(exclude_unset=True)
    return parsed if isinstance(parsed, Mapping) else {}


def load_config(
    engine: Mapping[str, Any] | None = None,
    *,
    engine_name: str = "engine configuration",
) -> AllReduceConfig:
    """The settings from all four sources.

    Args:
        engine: what the engine's own configuration says, by field name.
        engine_name: how errors call that source.

    Raises:
        ConfigError: naming the source, the field, the value and what is allowed.
    """
    merged: dict[str, Any] = {}

    def add(values: dict[str, Any]) -> None:
        nested = dict(_mapping(merged.get("low_precision"))) | dict(_mapping(values.get("low_precision")))
        merged.update(values)
        if nested:
            merged["low_precision"] = nested

    if path := os.environ.get(CONFIG_FILE_VARIABLE):
        add(_from_file(Path(path)))
    add(_from_environment())
    if engine is not None:
        if not isinstance(engine, Mapping):
            message = f"{engine_name}: {engine!r}: must be a mapping of settings"
            raise ConfigError(message)
        add(_validated(engine_name, engine))
    return AllReduceConfig(**merged)
