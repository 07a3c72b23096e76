"""Which size tuning measures next, and what follows from the times: the pure part."""

from __future__ import annotations

from llm_allreduce_plugin.algorithms.ranges import ONE_KERNEL, TWO_KERNELS, Range
from llm_allreduce_plugin.bench.compare import Comparison
from llm_allreduce_plugin.tuning.search import CLOSE_ENOUGH, SizeSearch

ROW = 16384


def row(size: int, one: float, two: float, *, eager: tuple[float, float] | None = None) -> Comparison:
    """Times in graphs; without ``eager`` those of calls from the host are the same."""
    in_graphs = {ONE_KERNEL: one, TWO_KERNELS: two}
    from_host = in_graphs if eager is None else dict(zip((ONE_KERNEL, TWO_KERNELS), eager, strict=True))
    return Comparison(size, in_graphs, from_host, 0.0, 0.0, {})


def test_nothing_is_searched_where_nothing_changes() -> None:
    search = SizeSearch(ROW)
    assert search.next_size() is None
    for size in (ROW, 64 * ROW):
        search.add(row(size, 3.0, 4.0))
    assert search.next_size() is None
    assert search.ranges()[0] == (Range(None, ONE_KERNEL),)


def test_the_crossover_is_closed_in_on() -> None:
    """Halved until the interval is small; sizes are whole rows, and the limit lies where times meet."""
    search = SizeSearch(ROW)
    crossing = 100 * ROW

    def measure(size: int) -> None:
        search.add(row(size, 10 + size / crossing, 11.0))

    for rows in (1, 16, 256, 4096):
        measure(rows * ROW)
    steps = []
    while (size := search.next_size()) is not None:
        assert size % ROW == 0
        steps.append(size)
        measure(size)
    assert 3 <= len(steps) <= 8
    limit = search.ranges()[0][0].max_bytes
    assert limit is not None
    assert crossing / CLOSE_ENOUGH < limit < crossing * CLOSE_ENOUGH
    assert (search.choice_at(limit), search.choice_at(limit + 1)) == (ONE_KERNEL, TWO_KERNELS)


def test_neighbours_are_close_enough_however_far_apart() -> None:
    """One row and two: there is no size between them."""
    search = SizeSearch(ROW)
    search.add(row(ROW, 3.0, 5.0))
    search.add(row(2 * ROW, 5.0, 3.0))
    assert search.next_size() is None
    assert len(search.ranges()[0]) == 2


def test_eager_calls_that_are_the_hosts_time_do_not_decide() -> None:
    search = SizeSearch(ROW)
    search.add(row(ROW, 3.0, 5.0, eager=(20.0, 19.0)))
    search.add(row(64 * ROW, 9.0, 12.0, eager=(21.0, 20.0)))
    in_graphs, eager = search.ranges()
    assert in_graphs == eager == (Range(None, ONE_KERNEL),)


def test_cpu_ranks_have_no_graphs() -> None:
    search = SizeSearch(ROW)
    for size, one, two in ((ROW, 20.0, 30.0), (16 * ROW, 90.0, 60.0)):
        search.add(Comparison(size, {}, {ONE_KERNEL: one, TWO_KERNELS: two}, 0.0, 0.0, {}))
    in_graphs, eager = search.ranges()
    assert in_graphs == eager
    assert [found.strategy for found in eager] == [ONE_KERNEL, TWO_KERNELS]
    assert search.next_size() == 4 * ROW
