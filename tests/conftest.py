"""Pools of ranks shared by the tests of a session, markers, and which tests may run beside others."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

# Before torch is imported; what tests start inherits it. Several processes run tests, and ranks are more: where each
# has a thread for every core, they wait for each other, and spin meanwhile. What one thread does in 0.2 s took 9 s so.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 4)))

import pytest
import torch

from llm_allreduce_plugin.measure.ranks import RankPool
from tests.support.marks import wants_slow
from tests.support.pool import ForkedPool
from tests.support.switched_off import SWITCHES as MULTICAST_SWITCHES
from tests.support.switched_off import WITH_ONE_SWITCH, Watch, refusal, watching

# Both are set before anything looks at them, and every process inherits them: `switches` looks whether all have, those
# that other processes start among them.
os.environ.update(MULTICAST_SWITCHES)


def _insist_on_switches(event: str, arguments: tuple[Any, ...]) -> None:
    """A process that could make a multicast object is not started."""
    if event != "subprocess.Popen":
        return
    environment = os.environ if arguments[3] is None else arguments[3]
    if (why := refusal(environment, os.environ.get("PYTEST_CURRENT_TEST", ""))) is not None:
        message = f"a test starts {arguments[0]!r} {why}"
        raise RuntimeError(message)


sys.addaudithook(_insist_on_switches)

PoolFor = Callable[[int], RankPool]
SMALL = 4  # ranks
# With several workers, which tests one of them runs: their names begin so, and the first that fits counts. CPU ranks
# share pools, and those that end look for what was left in shared memory, where nobody else leaves anything; there is
# one server at a time; those on GPUs share the GPUs; others share one process.
TOGETHER = {
    "tests/cpu/test_norm.py": "norms without ranks",
    "tests/cpu/test_norm_ranks.py": "threads as ranks",
    "tests/cpu/test_low_precision_forms.py": "threads as ranks",
    "tests/cpu/test_across.py": "commands",
    "tests/cpu/test_bench.py": "commands",
    "tests/cpu/test_diagnosis.py": "commands",
    "tests/cpu/test_killed_commands.py": "commands",
    "tests/cpu/test_ranks.py": "commands",
    "tests/cpu/test_tune": "commands",
    "tests/cpu/test_agreement.py": "CPU ranks that end",
    "tests/cpu/test_all_reduce.py": "CPU ranks that end",
    "tests/cpu/test_attacks.py": "CPU ranks that end",
    "tests/cpu/test_check_calls.py": "CPU ranks that end",
    "tests/cpu/test_close.py": "CPU ranks that end",
    "tests/cpu/test_fabric.py": "CPU ranks that end",
    "tests/cpu/test_hosts.py": "CPU ranks that end",
    "tests/cpu/test_peer_errors.py": "CPU ranks that end",
    "tests/cpu/test_shared_memory.py": "CPU ranks that end",
    "tests/cpu/": "CPU ranks",
    "tests/gpu/": "GPUs",
    "tests/engines/test_sglang_versions.py::test_hooks_in_sglangs_own_layers": "SGLang's layers",
    "tests/engines/test_sglang_fusion.py": "settings of SGLang",
    "tests/engines/test_sglang_settings.py": "settings of SGLang",
    "tests/engines/test_sglang_switches.py": "settings of SGLang",
    "tests/engines/test_vllm_settings.py": "settings of vLLM",
    "tests/engines/test_vllm_fusion.py": "graphs of vLLM",
    "tests/engines/": "servers",
    "tests/unit/test_accuracy.py": "errors of formats",
    "tests/unit/test_reports.py": "reports",
    "tests/unit/test_settings_documents.py::test_poisoned_files": "poisoned files",
}
# Of those that run together, and then of folders. What is long comes first, and many short ones last, so that all
# workers end together.
ORDER = ("servers", "CPU ranks that end", "CPU ranks", "commands", "kernels", "cpu", "engines", "unit", "gpu")

# A shell without job control starts background jobs deaf to Ctrl-C, and what they start inherits that: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_all_pools: list[_Pools] = []


class _Pools:
    """Small pools stay, as many tests use them in turns; of larger ones there is one: idle processes hold memory.

    ``small``: the largest world size of a pool that stays.
    """

    def __init__(self, make: PoolFor, small: int) -> None:
        self._make = make
        self._small = small
        self._pools: dict[int, RankPool] = {}
        _all_pools.append(self)

    def __call__(self, world_size: int) -> RankPool:
        for other, pool in list(self._pools.items()):
            is_large = max(other, world_size) > self._small
            if not all(p.is_alive() for p in pool.processes) or (is_large and other != world_size):
                self._pools.pop(other).close()
        if world_size not in self._pools:
            self._pools[world_size] = self._make(world_size)
        return self._pools[world_size]

    def close(self) -> None:
        while self._pools:
            self._pools.popitem()[1].close()


@pytest.fixture(autouse=True)
def switches(request: pytest.FixtureRequest) -> Iterator[Watch]:
    """Ranks, servers, commands and whatever they start have both switches against multicast."""
    if request.node.nodeid.startswith(WITH_ONE_SWITCH):
        yield Watch()
        return
    with watching() as watch:
        yield watch


# Caches are empty: no profile of whoever runs the tests decides anything.
@pytest.fixture(scope="session")
def cpu_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolFor]:
    cache = tmp_path_factory.mktemp("cache")
    pools = _Pools(lambda world_size: ForkedPool(world_size, cache), SMALL)
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def gpu_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolFor]:
    cache = tmp_path_factory.mktemp("cache")

    def make(world_size: int) -> RankPool:
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(cache)}):
            return RankPool(world_size, "cuda")

    pools = _Pools(make, 0)
    yield pools
    pools.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """What a test leaves in the environment, or what it imports does, reaches no other: vLLM sets LD_PRELOAD."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if os.environ != before:
            os.environ.clear()
            os.environ.update(before)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """No idle ranks beside the tests of another folder, which may start servers."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        for pools in _all_pools:
            pools.close()


def _world_size(item: pytest.Item) -> int:
    callspec = getattr(item, "callspec", None)
    return int(callspec.params.get("world_size", 0)) if callspec is not None else 0


def _order(item: pytest.Item) -> tuple[int, str, int, str, int]:
    """Tests that share a pool follow each other: those of a large one across the files that run together."""
    world_size = _world_size(item)
    uses_large = world_size > SMALL and "cpu_pool" in getattr(item, "fixturenames", ())
    folder, scope = item.path.parent, scope_of(item.nodeid)
    what = scope if scope in ORDER else folder.name
    place = ORDER.index(what) if what in ORDER else len(ORDER)
    return place, str(folder), world_size if uses_large else 0, str(item.path), world_size


def scope_of(name: str) -> str:
    """Tests of one scope are run by one worker, one after the other; ``name``: of a test, as pytest writes it."""
    return next((scope for begin, scope in TOGETHER.items() if name.startswith(begin)), name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadscope``, scopes are those of :func:`scope_of`.

    The groups of pytest-xdist 3.8 (``loadgroup``) would do, but with pytest 9.2 it does not see them.
    """
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scopes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return Scopes(config, log)


def pytest_collection_finish() -> None:
    """What tests are made of stays: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a pool follow each other. What needs more GPUs, or is slow and not asked for, is skipped."""
    items.sort(key=_order)
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("slow") is not None and not wants_slow():
            item.add_marker(pytest.mark.skip(reason="slow: ALLREDUCE_TEST_SLOW=1 runs it"))
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        needed = marker.args[0] if marker.args else 1
        if marker.kwargs.get("per_rank"):
            needed = max(needed, _world_size(item))
        if available < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), {available} here"))
