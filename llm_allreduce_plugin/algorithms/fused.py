"""All-reduce, residual, RMSNorm and quantization in one kernel: can it run, does it pay, and how is it launched. Pure.

Rows stay whole: a block, or a cluster of them, sums a row, keeps it in registers and norms it. What cannot be fused
runs as two kernels, which give the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from llm_allreduce_plugin.algorithms import measured, tables
from llm_allreduce_plugin.algorithms.base import MIN_SPLIT_LANES, VECTOR_BYTES, Merit, Message
from llm_allreduce_plugin.algorithms.decision import Algorithm, Epilogue, Exchange, Launch
from llm_allreduce_plugin.algorithms.facts import PAIR
from llm_allreduce_plugin.algorithms.measured import RowShape, Split
from llm_allreduce_plugin.algorithms.one_shot import OneShot
from llm_allreduce_plugin.algorithms.ranges import ONE_KERNEL, bytes_in_words
from llm_allreduce_plugin.algorithms.two_shot import TwoShot
from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.topology.links import Transport

if TYPE_CHECKING:
    from llm_allreduce_plugin.algorithms.facts import GroupFacts
    from llm_allreduce_plugin.config import AllReduceConfig

MOST_RANKS = 8
MOST_HIDDEN = 16384
FUSED_BYTES = 2  # of an element
WARP = 32


@dataclasses.dataclass(frozen=True)
class Rows:
    """A message whose rows are normed.

    Attributes:
        message: all of it.
        rows: at least one.
        hidden: elements of a row, a multiple of 8.
    """

    message: Message
    rows: int
    hidden: int

    @property
    def bytes(self) -> int:
        """Of a row."""
        return self.hidden * self.message.element_bytes

    @property
    def vectors(self) -> int:
        """Of a row."""
        return self.bytes // VECTOR_BYTES


def carrier(config: AllReduceConfig, facts: GroupFacts, message: Message, exact: Launch) -> Launch:
    """The launch of an all-reduce that the norm is put behind, given what the all-reduce alone would be.

    In one step rows are whole everywhere. Over two GPUs it sends no more than two steps do; over more it is still the
    faster kernel for some messages whose sum alone is faster in two, unless TWOSHOT is asked for.
    """
    if exact.wire_format is not None:  # another sum, behind which no kernel has a norm: see obstacle()
        return exact
    if exact.exchange is Exchange.MULTICAST:  # fused kernels push, with the same bits
        facts = facts.without_multicast()
        strategy = OneShot() if exact.algorithm is Algorithm.ONE_SHOT else TwoShot()
        exact = strategy.plan(config, facts, message)
    if exact.exchange is Exchange.PLACE:  # whose sums are outputs: in one kernel they are none
        exact = TwoShot().plan(config, facts, message)
    if exact.algorithm is not Algorithm.TWO_SHOT or facts.transport is Transport.SHM:
        return exact
    in_one_step = OneShot().plan(config, facts, message)
    if facts.world_size == PAIR:
        return in_one_step
    fits = in_one_step.exchange is Exchange.PUSH and takes_one_step(facts, message.payload_bytes)
    return in_one_step if fits and config.allreduce_strategy is not AllReduceStrategy.TWOSHOT else exact


def takes_one_step(facts: GroupFacts, payload_bytes: int) -> bool:
    """Whether one kernel sends a message in one step, and norms it, though its sum alone is faster in two."""
    return facts.transport is Transport.SYMMETRIC and payload_bytes <= tables.fused_one_step_bytes(facts)


def obstacle(facts: GroupFacts, rows: Rows, launch: Launch) -> str | None:
    """Why the norm cannot be in the kernel of an all-reduce, or None when it can. ``launch``: of :func:`carrier`."""
    if launch.hosts > 1:
        return f"only sums inside one host are fused, and this one is over {launch.hosts}"
    if launch.wire_format is not None:
        return "only exact sums are fused, and this one is compressed on the wire"
    if rows.message.element_bytes != FUSED_BYTES:
        return f"only 16-bit types are fused, not {rows.message.dtype}"
    if facts.transport is Transport.SHM:
        return None
    if facts.world_size > MOST_RANKS:
        return f"there are fused kernels for 2 to {MOST_RANKS} ranks, not for {facts.world_size}"
    if rows.hidden > MOST_HIDDEN:
        return f"a row of {rows.hidden} elements is more than a fused kernel takes, {MOST_HIDDEN}"
    return _exchange_obstacle(facts, rows, launch)


def _exchange_obstacle(facts: GroupFacts, rows: Rows, launch: Launch) -> str | None:
    """The same for how a GPU's rows travel, and are kept."""
    if launch.exchange not in {Exchange.PUSH, Exchange.SHARED}:
        return f"only what travels in band is fused, and this message is {launch.exchange_in_words}"
    if launch.exchange is Exchange.SHARED and launch.algorithm is not Algorithm.ONE_SHOT:
        return "through host memory only one-shot is fused"
    slot = _slot_bytes(facts, launch.algorithm)  # shared, the message fits it
    if rows.bytes > slot:
        return f"a row of {rows.bytes} bytes does not fit a slot of {slot} (workspace_bytes)"
    shape = _shape(launch)
    if rows.vectors > (most := _block_vectors(shape)) and not _has_clusters(facts, shape):
        most *= VECTOR_BYTES // FUSED_BYTES
        return f"a row of {rows.hidden} elements is more than a block holds here, {most}"
    return None


def pays(facts: GroupFacts, rows: Rows, launch: Launch) -> Merit:
    """Whether one kernel, which can run, does better than two: as a profile says, or the numbers of ``measured``."""
    payload = rows.message.payload_bytes
    table = None if facts.tuned is None else facts.tuned.fused_table(rows.message.element_bytes)
    if table is not None:
        pays_ = table.range_of(payload)[1].strategy == ONE_KERNEL
        faster = "one kernel is faster than two" if pays_ else "two kernels are faster than one"
        return Merit(pays=pays_, reason=f"{table.place_of(payload)}, where {faster} ({table.source})")
    if facts.transport is Transport.SHM:
        return Merit(pays=True, reason="fuse_norm is on")
    sizes, source = tables.fused_pays(launch.algorithm.name, facts)
    if sizes is None:
        through = "through host memory " if facts.transport is Transport.HOST else ""
        return Merit(pays=False, reason=f"{through}two kernels are faster than one ({source})")
    least, most = sizes
    if payload < least:
        steps = "in two steps " if launch.algorithm is Algorithm.TWO_SHOT else ""
        reason = f"{steps}below {bytes_in_words(least)} two kernels are faster than one ({source})"
        return Merit(pays=False, reason=reason)
    if most is not None and payload > most:
        return Merit(pays=False, reason=f"above {bytes_in_words(most)} two kernels are faster than one ({source})")
    reason = f"fuse_norm is on; {source}"
    if facts.world_size == PAIR:
        reason += "; over 2 ranks one step sends no more than two"
    return Merit(pays=True, reason=reason)


def plan(facts: GroupFacts, rows: Rows, launch: Launch) -> Launch:
    """How a call is spread that is like ``launch``, of :func:`carrier`, with the norm behind it."""
    if facts.transport is Transport.SHM:
        return dataclasses.replace(launch, epilogue=Epilogue.RMS_NORM)
    shape = _shape(launch)
    parts = facts.world_size if launch.algorithm is Algorithm.TWO_SHOT else 1
    own = math.ceil(rows.rows / parts)  # of the rank that has most
    capacity = _slot_bytes(facts, launch.algorithm) // rows.bytes
    in_a_round = math.ceil(own / math.ceil(own / capacity))  # alike, so that no rank has more to do in the last
    wide = _is_wide(facts, rows, launch, shape)
    cluster = _cluster(facts, rows, in_a_round, shape, wide=wide)
    wide &= cluster == 1
    spread = Launch(
        launch.algorithm,
        launch.exchange,
        lanes=_lanes(facts, in_a_round, cluster, wide=wide),
        threads=_whole_warps(rows.vectors) if wide else _threads(math.ceil(rows.vectors / cluster), shape),
        chunk_vectors=in_a_round * rows.vectors,
        rounds=math.ceil(rows.rows / (in_a_round * parts)),
        epilogue=Epilogue.RMS_NORM,
        cluster=cluster,
    )
    return _with_idle(facts, spread if cluster > 1 or wide else _split(facts, rows, spread, shape))


def _shape(launch: Launch) -> RowShape:
    if launch.exchange is Exchange.PUSH and launch.algorithm is Algorithm.TWO_SHOT:
        return measured.ROW_SHAPES["PUSH_TWO_SHOT"]
    return measured.ROW_SHAPES[launch.exchange.name]


def _slot_bytes(facts: GroupFacts, algorithm: Algorithm) -> int:
    return facts.in_band.one_shot if algorithm is Algorithm.ONE_SHOT else facts.in_band.two_shot


def _whole_warps(threads: int) -> int:
    return math.ceil(threads / WARP) * WARP


def _threads(vectors: int, shape: RowShape) -> int:
    """Of a block that takes a row: as few vectors to a thread as there can be."""
    choices = (_whole_warps(math.ceil(vectors / each)) for each in shape.vectors)
    return next(threads for threads in choices if threads <= shape.most_threads)


def _block_vectors(shape: RowShape) -> int:
    """The most vectors of a row that a block holds."""
    return shape.most_threads * max(shape.vectors)


def _is_wide(facts: GroupFacts, rows: Rows, launch: Launch, shape: RowShape) -> bool:
    """Whether one block takes a row at a vector to a thread, with more threads than other kernels have.

    Measured where clusters are an alternative, and only there.
    """
    return (
        facts.world_size == PAIR
        and launch.algorithm is Algorithm.ONE_SHOT
        and shape.most_threads < rows.vectors <= shape.wide_threads
        and not _is_large(rows, shape)
        and _has_clusters(facts, shape)
    )


def _is_large(rows: Rows, shape: RowShape) -> bool:
    """Whether lanes have one task each, if there are enough."""
    return shape.split_bytes is not None and rows.message.payload_bytes >= shape.split_bytes


def _lanes(facts: GroupFacts, rows: int, cluster: int, *, wide: bool) -> int:
    """Of a grid in which each does everything, for so many rows at once."""
    most = facts.lanes // cluster * cluster
    if wide and rows <= facts.lanes:  # a multiprocessor holds one of them: two rows each, rather than two waves of one
        most = facts.lanes // 2
    return min(rows * cluster, most)


def _with_idle(facts: GroupFacts, launch: Launch) -> Launch:
    """The same with lanes that have no row, where a matrix product behind it would be slower without those.

    It then finds the GPU as it would have without this kernel (:class:`~.measured.Leaves`).
    """
    is_known = facts.multiprocessors == measured.LEAVES.multiprocessors
    if not is_known or launch.exchange is not Exchange.PUSH or launch.scatter_lanes:
        return launch
    cluster = launch.cluster
    lanes = measured.LEAVES.padded(launch.lanes // cluster, cluster, facts.lanes // cluster) * cluster
    return dataclasses.replace(launch, lanes=lanes, idle_lanes=lanes - launch.lanes)


def _cluster(facts: GroupFacts, rows: Rows, in_a_round: int, shape: RowShape, *, wide: bool) -> int:
    """Blocks that share a row: as many as find work where there are few rows, or as hold it.

    ``in_a_round``: rows that a rank takes at once. ``wide``: one wide block would hold a row.
    """
    if _has_clusters(facts, shape):
        is_short = rows.vectors <= shape.most_threads
        for sharing in shape.sharing:
            of_long = sharing.most_lanes_of_wide if wide else sharing.most_lanes
            most = (sharing.most_lanes_of_short if is_short else of_long) * facts.lanes // measured.LARGEST_GRID
            if rows.vectors >= sharing.least_vectors * sharing.blocks and in_a_round * sharing.blocks <= most:
                return sharing.blocks
    if wide:
        return 1
    return 1 << (math.ceil(rows.vectors / _block_vectors(shape)) - 1).bit_length()


def _has_clusters(facts: GroupFacts, shape: RowShape) -> bool:
    has_any = bool(shape.sharing) and facts.lanes >= measured.MOST_SHARING
    return has_any and (facts.architecture or 0) >= measured.CLUSTERS_FROM


def _split(facts: GroupFacts, rows: Rows, spread: Launch, shape: RowShape) -> Launch:
    """The same with one task to a lane, where the message is large enough for it."""
    in_a_round = spread.chunk_vectors // rows.vectors
    is_short = rows.vectors <= shape.most_threads
    if is_short and in_a_round <= facts.lanes:  # a block to a row is faster
        return spread
    threads = _whole_warps(math.ceil(rows.vectors / max(shape.vectors)))
    tasks = _tasks(facts, spread.algorithm, threads, shape) if _is_large(rows, shape) else None
    if tasks is not None and in_a_round >= tasks.lanes - tasks.scatter - tasks.drain:  # a row to each that sums
        return dataclasses.replace(
            spread, lanes=tasks.lanes, threads=threads, scatter_lanes=tasks.scatter, drain_lanes=tasks.drain
        )
    if is_short and threads <= shape.paired_threads and facts.world_size == PAIR:  # rows by turns: two blocks at once
        return dataclasses.replace(spread, threads=threads)
    return spread


def _tasks(facts: GroupFacts, algorithm: Algorithm, threads: int, shape: RowShape) -> Split | None:
    """Lanes that scatter and drain, in a grid of blocks of ``threads``. None: there are no kernels for it."""
    if facts.lanes < MIN_SPLIT_LANES:
        return None
    if algorithm is Algorithm.TWO_SHOT:
        return measured.FUSED_TWO_SHOT_SPLIT.on(facts.lanes)
    if facts.world_size != PAIR or not shape.pushes:
        return None
    lanes = facts.lanes if threads <= shape.paired_threads else facts.lanes // 2
    pushing = facts.lanes * tables.pushing_warps(facts) // measured.LARGEST_GRID * WARP // threads
    return Split(0, lanes, min(max(1, pushing), int(lanes * measured.MOST_PUSHING)), 0)
