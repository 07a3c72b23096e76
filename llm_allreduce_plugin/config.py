"""Settings: what they are, where they come from, and what is said when one is wrong.

Four sources, later wins: defaults; a YAML or JSON file named by ``LLM_ALLREDUCE_CONFIG``; environment variables
``LLM_ALLREDUCE_*``; the engine's own configuration.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError

from llm_allreduce_plugin.base.validation import shown
from llm_allreduce_plugin.errors import ConfigError
from llm_allreduce_plugin.settings import environment
from llm_allreduce_plugin.settings.choices import (
    AllReduceStrategy,
    LowPrecisionAlgorithm,
    MulticastChoice,
    StagedChoice,
    TransportChoice,
    WireFormat,
)
from llm_allreduce_plugin.settings.documents import read_settings
from llm_allreduce_plugin.settings.environment import (
    CONFIG_FILE_VARIABLE,
    ENV_PREFIX,
    Found,
    settings_file,
    variable_of,
)
from llm_allreduce_plugin.settings.faults import described, validated
from llm_allreduce_plugin.settings.values import (
    MOST_BYTES_OF_A_MESSAGE,
    Settings,
    lower_case,
    mapping,
    no_boolean,
    path,
    size,
    switch,
)

__all__ = [
    "CONFIG_FILE_VARIABLE",
    "ENV_PREFIX",
    "NO_PROFILE",
    "AllReduceConfig",
    "AllReduceStrategy",
    "LlmArgs",
    "LowPrecisionAlgorithm",
    "LowPrecisionConfig",
    "MulticastChoice",
    "StagedChoice",
    "TransportChoice",
    "WireFormat",
    "environment_table",
    "in_environment",
    "load_config",
]

logger = logging.getLogger(__name__)

# As a tuning profile: use none.
NO_PROFILE = "none"
MOST_DOMAINS = 1024  # NUMA nodes that Linux can number


def _profile(value: object) -> object:
    """``none`` in any case, or a path."""
    if isinstance(value, str) and not value.strip():
        message = f"must be a file, or {NO_PROFILE}"
        raise ValueError(message)
    return NO_PROFILE if lower_case(value) == NO_PROFILE else path(value)


Strategy = Annotated[AllReduceStrategy, BeforeValidator(AllReduceStrategy.parse)]
MessageBytes = Annotated[int, Field(ge=0, le=MOST_BYTES_OF_A_MESSAGE), BeforeValidator(size)]
WorkspaceBytes = Annotated[int, Field(ge=2 << 20, le=1 << 33), BeforeValidator(size)]
PoolBytes = Annotated[int, Field(ge=0, le=1 << 37), BeforeValidator(size)]
Domain = Annotated[int, Field(ge=0, lt=MOST_DOMAINS), BeforeValidator(no_boolean)]
Folder = Annotated[Path, BeforeValidator(path)]


class _Sources(dict[str, str]):
    """Where fields are from. A note beside the settings: these are the same wherever they are from."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Sources)

    __hash__ = None


class LowPrecisionConfig(Settings):
    """What LOWPRECISION does. Frozen; unknown keys are errors."""

    wire_format: Annotated[WireFormat, BeforeValidator(lower_case)] = Field(
        default=WireFormat.FP8, description="what values are sent as"
    )
    algorithm: Annotated[LowPrecisionAlgorithm, BeforeValidator(lower_case)] = Field(
        default=LowPrecisionAlgorithm.AUTO,
        description="how packets move; auto is one_shot for fp8 and fp8_group between two GPUs (through host memory "
        "fp8 alone, to 1 MiB), hierarchical for fp8 where GPUs without NVLink form two NUMA domains of equal size, "
        "otherwise two_shot",
    )
    domains: Annotated[tuple[Domain, ...], Field(min_length=2, max_length=MOST_DOMAINS)] | None = Field(
        default=None,
        description="the domain of each rank, as numbers like [0, 0, 1, 1]; default: the NUMA node of its GPU",
    )
    min_bytes: MessageBytes | None = Field(
        default=None,
        description="smallest message per rank that is compressed; default: from where it pays, all with fp8_group",
    )


class AllReduceConfig(Settings):
    """Every setting of the plugin. Frozen; unknown keys are errors."""

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
        description="the same for the first call, and for the first of each CUDA graph, before which ranks may compile "
        "for unequal times; never less than timeout_s",
    )
    start_timeout_s: float = Field(
        default=300.0,
        gt=0,
        le=86400,
        allow_inf_nan=False,
        description="seconds that a rank waits for the others in a step of the start",
    )
    transport: Annotated[TransportChoice, BeforeValidator(lower_case)] = Field(
        default=TransportChoice.AUTO,
        description="GPUs: 'peer' for each other's memory (NVLink, PCIe peer access), 'host' for pinned host memory, "
        "'auto' for the first where it works and NCCL_P2P_DISABLE does not forbid it, otherwise the second",
    )
    workspace_bytes: WorkspaceBytes | None = Field(
        default=None,
        description="memory per rank through which messages of any size are passed in chunks, as a number or like "
        "'64MiB'; default 192 MiB of a GPU, 96 MiB of each of two, 384 MiB for kernels that wait for flags; 48 MiB of "
        "host memory for all GPUs together; 4 MiB on a CPU rank",
    )
    registered_pool: PoolBytes | None = Field(
        default=None,
        description="registered memory of each rank, for outputs that UB has peers store into, as a number or like "
        "'64MiB'; it never grows, and 0 is none; default 512 MiB of a GPU of more than two (16 MiB on a CPU rank) "
        "with UB, otherwise 0",
    )
    one_shot_max_bytes: MessageBytes | None = Field(
        default=None,
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
    staged: Annotated[StagedChoice, BeforeValidator(switch)] = Field(
        default=StagedChoice.AUTO,
        description="3 or more GPUs joined by PCIe peer access: TWOSHOT and LOWPRECISION keep each to one outbound "
        "and one inbound stream at a time; 'auto' for large messages where NVLink does not join all; 'on', 'off'",
    )
    multicast: Annotated[MulticastChoice, BeforeValidator(switch)] = Field(
        default=MulticastChoice.OFF,
        description="NVSwitch nodes: ONESHOT and TWOSHOT store once what is for all ranks; 'on', 'auto' (3 or more "
        "ranks), 'off'; not run on hardware yet; does nothing where TORCH_SYMM_MEM_DISABLE_MULTICAST=1 or "
        "NCCL_NVLS_ENABLE=0",
    )
    in_switch_sum: bool = Field(
        default=False,
        description="with multicast, TWOSHOT lets the switch sum: of a large message a GPU sends 1.25 times its bytes "
        "instead of 1.5 with 4 ranks, 1.125 instead of 1.75 with 8, and as much with 3; but in no order that anybody "
        "knows, so bits may change from run to run; never under AUTO",
    )
    fuse_norm: bool = Field(
        default=True,
        description="residual, RMSNorm and quantization behind an all-reduce run in its kernel, with the same bits; "
        "off: in a kernel of their own, and an engine's graph is left as it is",
    )
    low_precision: Annotated[LowPrecisionConfig, BeforeValidator(mapping)] = Field(
        default=LowPrecisionConfig(),
        description=f"LOWPRECISION: wire_format ({', '.join(WireFormat)}), algorithm "
        f"({', '.join(LowPrecisionAlgorithm)}), domains, min_bytes",
    )
    report_dir: Folder | None = Field(
        default=None,
        description="folder in which every rank keeps rank-<r>.json: strategies, calls and reasons",
    )

    check_calls: bool = Field(
        default=False,
        description="before every call (captured ones when they are captured) ranks compare its size, type and launch, "
        "and name the first difference; for finding a fault, some milliseconds a call",
    )

    _sources: _Sources = PrivateAttr(default_factory=_Sources)

    def told_from(self, sources: Mapping[str, str]) -> Self:
        """The same, which knows where its fields are from. ``sources``: source and name there, by field."""
        self._sources = _Sources(sources)
        return self

    def name_of(self, field: str) -> str:
        """What errors call a field, one that is nested after its own: with its source in front, where that is known."""
        return self._sources.get(field, field)

    def check_world_size(self, world_size: int) -> None:
        """Check what depends on the number of ranks.

        Raises:
            ConfigError: naming the source, the field, its value and what is allowed.
        """
        domains = self.low_precision.domains
        if domains is not None and len(domains) != world_size:
            message = (
                f"{self.name_of('low_precision.domains')}={shown(list(domains))}: has {len(domains)} numbers: must "
                f"have one for each of the {world_size} ranks"
            )
            raise ConfigError(message)


class LlmArgs(Settings):
    """The plugin's settings the way engine arguments are written.

    ``vllm.LLM(model, **LlmArgs(allreduce_strategy="ONESHOT").vllm_kwargs())``, and
    ``sglang.Engine(model_path=model, **LlmArgs(allreduce_strategy="ONESHOT").sglang_kwargs())``.

    What is not given is left to the other sources: without arguments, nothing is overridden.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """

    allreduce_strategy: Strategy = AllReduceStrategy.AUTO
    allreduce: AllReduceConfig | None = Field(default=None, description="further settings; must not contradict")

    def __init__(self, **values: Any) -> None:  # noqa: ANN401
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise described("LlmArgs", LlmArgs, error) from None

    def allreduce_config(self) -> AllReduceConfig:
        """The settings as one object, in which only what was given is set.

        Raises:
            ConfigError: ``allreduce`` names another strategy than ``allreduce_strategy``.
        """
        further = self.allreduce or AllReduceConfig()
        if "allreduce_strategy" not in self.model_fields_set:
            return further
        there = further.allreduce_strategy
        if "allreduce_strategy" in further.model_fields_set and there != self.allreduce_strategy:
            message = (
                f"LlmArgs: allreduce_strategy={self.allreduce_strategy} but allreduce.allreduce_strategy={there}: "
                "give one of them"
            )
            raise ConfigError(message)
        return further.model_copy(update={"allreduce_strategy": self.allreduce_strategy})

    def vllm_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for ``vllm.LLM``."""
        return {"additional_config": {"allreduce": self._given()}}

    def sglang_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for ``sglang.Engine``.

        The settings stand under a key of their own in ``json_model_override_args``. Who overrides something of the
        model, too, adds that to the same JSON object.
        """
        return {"json_model_override_args": json.dumps({"llm_allreduce": self._given()})}

    def _given(self) -> dict[str, Any]:
        return self.allreduce_config().model_dump(mode="json", exclude_unset=True)


# Settings that are mappings, with the names in them.
_NESTED = {"low_precision": tuple(LowPrecisionConfig.model_fields)}


def environment_table() -> list[tuple[str, str]]:
    """Every environment variable that is read at run time, with what it means."""
    rows = [(CONFIG_FILE_VARIABLE, "YAML or JSON file with the settings below")]
    rows += [(variable_of(name), field.description or "") for name, field in AllReduceConfig.model_fields.items()]
    return rows


def in_environment(variables: Mapping[str, str] | None = None) -> Found:
    """What environment variables say, as text. ``variables``: instead of this process's.

    Raises:
        ConfigError: a variable is a misspelled setting.
    """
    return environment.read(list(AllReduceConfig.model_fields), _NESTED, os.environ if variables is None else variables)


@functools.cache
def _warn_of(unknown: tuple[str, ...]) -> None:
    """Once in a process, however often settings are read."""
    logger.warning("environment: %s: not a setting, and ignored", ", ".join(unknown))


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
    sources: dict[str, str] = {}

    def add(source: str, values: Mapping[Any, Any], label: Mapping[str, str] | None = None) -> None:
        # Every source by itself, so that an error names the one that is wrong.
        found = validated(source, AllReduceConfig, values, label).model_dump(exclude_unset=True)
        for name, value in found.items():
            field = f"{source}: {(label or {}).get(name, name)}"
            sources[name] = field
            if name in _NESTED:
                sources.update({f"{name}.{inner}": f"{field}.{inner}" for inner in value})
                found[name] = merged.get(name, {}) | value
        merged.update(found)

    variables = in_environment()
    if variables.file is not None:
        file = settings_file(variables.file)
        add(f"file {file}", read_settings(file, CONFIG_FILE_VARIABLE))
    add("environment", variables.values, {name: variable_of(name) for name in AllReduceConfig.model_fields})
    if variables.unknown:
        _warn_of(variables.unknown)
    if engine is not None:
        if not isinstance(engine, Mapping):
            message = f"{engine_name}: {shown(engine)}: must be a mapping of settings"
            raise ConfigError(message)
        add(engine_name, engine)
    return validated("settings", AllReduceConfig, merged).told_from(sources)
