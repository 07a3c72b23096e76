"""What ranks exchange as bytes: everything of this package comes back, and nothing else is made or called."""

from __future__ import annotations

import enum
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from llm_allreduce_plugin import AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.base.pickled import dump, load
from llm_allreduce_plugin.topology.links import TopologyClass, Transport

VALUES = [
    None,
    (1, 2.5, "three", b"four", [True], {"five": {6}}),
    Path("/seven"),
    AllReduceStrategy.AUTO,
    AllReduceConfig(allreduce_strategy="ONESHOT", report_dir="/tmp/reports"),
    GroupFacts(world_size=2, device="cpu", transport=Transport.SHM, topology_class=TopologyClass.CPU),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_come_back(value: object) -> None:
    assert load(dump(value)) == value


def _by_name(self: enum.Enum, _protocol: int) -> Any:
    return getattr, (type(self), self.name)


@pytest.mark.parametrize("value", VALUES[3:], ids=lambda value: type(value).__name__)
def test_members_of_enums_come_back_from_the_first_versions_of_python_3_11(value: object) -> None:
    """Which have them looked up by ``getattr``; Debian 12 ships one."""
    with mock.patch.object(enum.Enum, "__reduce_ex__", _by_name):
        data = dump(value)
    assert load(data) == value


@pytest.mark.parametrize("value", (eval, getattr, pytest.raises, Path("/").exists), ids=lambda value: value.__name__)
def test_nothing_else_is_read(value: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="is not of this package"):
        load(pickle.dumps(value, protocol=4))
