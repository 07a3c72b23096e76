"""Eager calls in one step: what they take, what they leave to Python, and what they keep. Two ranks in this process."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Decision
from llm_allreduce_plugin.runtime import eager_calls
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES, kernel_call
from llm_allreduce_plugin.runtime.eager_calls import EagerCalls, no_eager_call
from llm_allreduce_plugin.runtime.plans import Planned, Plans
from tests.unit.test_native_calls import Ranks

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch says where tensors lie from 2.10 on"
)

CPU = torch.device("cpu")
COUNT = 6 * 8
DTYPES = list(DTYPE_CODES)


class NoHealth:
    """Of a group in which nothing is wrong."""

    def raise_error(self) -> None:
        """Nothing to raise."""


HEALTH: Any = NoHealth()
ANY_LAUNCH: Any = SimpleNamespace(scatter_lanes=0)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    for workspace in made.workspaces:
        workspace.close(5.0)


def calls_of(plan: _C.Plan, dtype: torch.dtype, count: int = COUNT, *, must_be_aligned: bool = False) -> EagerCalls:
    made = EagerCalls(CPU)
    assert made.call is not no_eager_call, "this torch has the interface"
    made.keep(count, dtype, plan, HEALTH, "ONESHOT", must_be_aligned=must_be_aligned)
    return made


def sum_of(ranks: Ranks, dtype: torch.dtype, call: Callable[[], Any]) -> Any:
    """What the first rank's call gives; the second rank sends threes meanwhile."""
    threes = torch.full((COUNT,), 3.0, dtype=dtype)
    end = ranks.start(1, _second_plan(ranks, dtype, threes))
    result = call()
    assert end() == 0
    return result


def _second_plan(ranks: Ranks, dtype: torch.dtype, values: torch.Tensor) -> Any:
    plan = ranks.plan(1, COUNT, dtype=DTYPE_CODES[dtype])
    output = torch.empty_like(values)
    return lambda _source, _target: plan(values.data_ptr(), output.data_ptr())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_the_one_that_python_makes(ranks: Ranks, dtype: torch.dtype) -> None:
    plan = ranks.plan(0, COUNT, dtype=DTYPE_CODES[dtype])
    calls, in_python = calls_of(plan, dtype), kernel_call(plan, ANY_LAUNCH, HEALTH, CPU, "ONESHOT")
    for number, shape in enumerate([(6, 8), (6, 8), (COUNT,), (2, 1, 3, 8), (6, 8)]):
        mine = torch.randn(shape).to(dtype)
        before = mine.clone()
        fast = sum_of(ranks, dtype, lambda mine=mine: calls.call(mine))
        slow = sum_of(ranks, dtype, lambda mine=mine: in_python(mine))
        assert torch.equal(fast, slow)
        assert torch.equal(fast, (mine.float() + 3).to(dtype))
        assert (fast.shape, fast.stride(), fast.dtype, fast.device) == (shape, slow.stride(), dtype, CPU)
        assert torch.equal(mine, before)
        assert fast.data_ptr() != mine.data_ptr()
        assert plan.calls == 2 * number + 2, "each was counted once"
    assert plan.captured == 0


def test_what_is_left_to_python(ranks: Ranks) -> None:
    """Nothing of it starts a call: a rank alone would wait until its deadline."""
    plan = ranks.plan(0, COUNT)
    call = calls_of(plan, torch.float32).call
    whole = torch.randn(6, 8)
    others = {
        "another size": torch.randn(6, 7),
        "empty": torch.randn(0, 8),
        "transposed": torch.randn(8, 6).t(),
        "every second column": torch.randn(6, 16)[:, ::2],
        "expanded": torch.randn(1, 8).expand(6, 8),
        "another type": whole.bfloat16(),
        "no sum of ours": torch.zeros(COUNT, dtype=torch.int32),
        "64 bits": whole.double(),
        "on no device": torch.empty(6, 8, device="meta"),
        "sparse": whole.to_sparse(),
        "a parameter": torch.nn.Parameter(whole),
    }
    for name, tensor in others.items():
        assert call(tensor) is None, name
    assert call("no tensor") is None  # type: ignore[arg-type]
    seen: list[object] = []
    torch.func.vmap(lambda row: (seen.append(call(row)), row)[1])(torch.randn(2, COUNT))
    assert seen == [None], "a tensor that stands for many"
    assert plan.calls == 0


def test_strides_that_do_not_count(ranks: Ranks) -> None:
    """Of a dimension of size 1, as torch sees it."""
    mine = torch.randn(1, COUNT).as_strided((1, COUNT), (1000, 1))
    assert mine.is_contiguous()
    calls = calls_of(ranks.plan(0, COUNT), torch.float32)
    result = sum_of(ranks, torch.float32, lambda: calls.call(mine))
    assert torch.equal(result, mine + 3)


def test_where_the_input_must_start_on_a_vector(ranks: Ranks) -> None:
    calls = calls_of(ranks.plan(0, COUNT), torch.float32, must_be_aligned=True)
    memory = torch.randn(COUNT + 8)
    start = -memory.data_ptr() % 16 // 4
    assert calls.call(memory[start + 1 : start + 1 + COUNT]) is None
    aligned = memory[start : start + COUNT]
    assert torch.equal(sum_of(ranks, torch.float32, lambda: calls.call(aligned)), aligned + 3)


def test_a_call_that_is_refused_raises(ranks: Ranks) -> None:
    calls = calls_of(ranks.plan(0, COUNT), torch.float32)
    ranks.workspaces[0].close(1.0)
    with pytest.raises(RuntimeError, match="closed"):
        calls.call(torch.randn(6, 8))


def test_nothing_is_kept_of_what_was_forgotten(ranks: Ranks) -> None:
    plan = ranks.plan(0, COUNT)
    held = sys.getrefcount(plan)
    calls = calls_of(plan, torch.float32)
    assert sys.getrefcount(plan) == held + 1
    calls.forget((COUNT, torch.int32))
    calls.forget((COUNT, torch.float32))
    assert calls.call(torch.randn(6, 8)) is None
    assert sys.getrefcount(plan) == held
    calls.keep(COUNT, torch.float32, plan, HEALTH, "ONESHOT", must_be_aligned=False)
    calls.keep(COUNT, torch.float32, plan, HEALTH, "ONESHOT", must_be_aligned=False)
    assert sys.getrefcount(plan) == held + 1
    calls.clear()
    assert sys.getrefcount(plan) == held


def test_an_evicted_plan_is_forgotten_and_one_in_use_is_not(ranks: Ranks) -> None:
    gone: list[int] = []
    plans: Plans[int, Any] = Plans(3, gone.append)
    decision: Any = object.__new__(Decision)
    counts = {}
    for key in range(6):
        counts[key] = SimpleNamespace(calls=1, captured=0)
        plans.keep(key, Planned(decision, print, counts[key]))
        counts[0].calls += 1  # called again and again
        assert set(plans) == set(range(key + 1)) - set(gone)
    assert 0 in plans
    assert gone == [1, 2, 3]
    for count in counts.values():
        count.calls += 1
    plans.keep(9, None)
    assert len(gone) == 4
    assert gone[-1] not in plans


def test_a_torch_without_the_interface_or_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then Python takes every step, as it did before torch 2.10."""
    api = torch.Tensor.__dlpack_c_exchange_api__
    for other in (None, object(), "text"):
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", other)
        assert EagerCalls(CPU).call is no_eager_call
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    calls = EagerCalls(CPU)
    assert calls.call(torch.randn(3)) is None
    calls.clear()
    calls.forget((3, torch.float32))
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", api, raising=False)
    monkeypatch.setattr(eager_calls, "empty_strided_of", lambda _device: None)
    assert EagerCalls(CPU).call is no_eager_call


def test_it_ends_with_its_owner(ranks: Ranks) -> None:
    calls = calls_of(ranks.plan(0, COUNT), torch.float32)
    ended = weakref.ref(calls)
    del calls
    gc.collect()
    assert ended() is None
