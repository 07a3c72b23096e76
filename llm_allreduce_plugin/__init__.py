"""The all-reduce under tensor-parallel LLM serving: one setting, the fastest exact kernel, the same bits everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_allreduce_plugin._version import __version__
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, LlmArgs, load_config
from llm_allreduce_plugin.errors import (
    AllReduceError,
    ConfigError,
    GroupBrokenError,
    PeerTimeoutError,
    ProfileError,
    RankMismatchError,
    StartError,
    StartTimeoutError,
    TopologyError,
    TransportError,
)

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms import Decision
    from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator
    from llm_allreduce_plugin.topology import NodeTopology

__all__ = [
    "AllReduceConfig",
    "AllReduceError",
    "AllReduceStrategy",
    "ConfigError",
    "Decision",
    "GroupBrokenError",
    "LlmArgs",
    "NodeTopology",
    "PeerTimeoutError",
    "ProfileError",
    "RankMismatchError",
    "StartError",
    "StartTimeoutError",
    "TensorParallelCommunicator",
    "TopologyError",
    "TransportError",
    "__version__",
    "load_config",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (torch is imported only by those who need it)
    if name == "TensorParallelCommunicator":
        from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator

        return TensorParallelCommunicator
    if name == "Decision":
        from llm_allreduce_plugin.algorithms import Decision

        return Decision
    if name == "NodeTopology":
        from llm_allreduce_plugin.topology import NodeTopology

        return NodeTopology
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
