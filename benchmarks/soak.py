"""A soak: random sizes, dtypes and kinds of calls, eager and in graphs, every answer compared bit for bit.

    python benchmarks/soak.py --gpus 4 --seconds 600 --out benchmarks/h100/soak_tp4.json
    python benchmarks/soak.py --gpus 0 --seconds 10

Every step draws one of ``KINDS`` (each strategy, with its usual workspace and with one so small that most messages take
many rounds; outputs in registered memory; host memory; wire formats; residual and norm behind the sum), a dtype and a
size, and either calls it eagerly, captures a new graph of one to three calls, or replays one of the graphs kept, some
of which are dropped on the way. Inputs are new at every step, outputs of graphs are poisoned before each replay. The
expected bits are those of the rank-ordered fp32 sum, of the norm's oracle behind it, and of a wire format's oracle.
Ranks draw alike, and each compares its own outputs. ``--gpus 0``: two CPU ranks, without graphs.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin import TensorParallelCommunicator
from llm_allreduce_plugin.measure import norm_answers
from llm_allreduce_plugin.measure.answers import make_input, rank_ordered_sum, wrong_elements
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from tests.support.low_precision import expected_sum

WIDE, NARROW = (torch.bfloat16, torch.float16, torch.float32), (torch.bfloat16, torch.float16)
GRAPHS_KEPT = 12
STEPS_PER_TURN = 50
SMALL = {"workspace_bytes": 4 << 20}
MIB = 1 << 20
EPS = 1e-5
HIDDEN = (8, 512, 2880, 4096, 8192, 16384)
LARGEST_COMPRESSED = 1 << 18  # elements: oracles of wire formats take their time


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one step can be of."""

    strategy: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: Sequence[torch.dtype] = WIDE
    largest: int = 1 << 40  # elements
    registered: bool = False
    norm: bool = False
    gpus: bool = False  # is not for CPU ranks


def _wire(name: str, **more: Any) -> Kind:  # noqa: ANN401
    settings = {"low_precision": {"wire_format": name, "min_bytes": 0}, **more}
    return Kind("LOWPRECISION", settings, NARROW, LARGEST_COMPRESSED, gpus="transport" in more)


KINDS = {
    "ONESHOT": Kind("ONESHOT"),
    "ONESHOT, rounds": Kind("ONESHOT", SMALL, largest=MIB),
    "TWOSHOT": Kind("TWOSHOT"),
    "TWOSHOT, rounds": Kind("TWOSHOT", SMALL, largest=MIB),
    "MINLATENCY": Kind("MINLATENCY"),
    "MINLATENCY, by flags": Kind("MINLATENCY", {"in_band": False}),
    "AUTO": Kind("AUTO"),
    "UB": Kind("UB", {"registered_pool": "256MiB"}, registered=True),
    "UB, outputs of its own": Kind("UB", {"registered_pool": "256MiB"}),
    "host": Kind("MINLATENCY", {"transport": "host"}, gpus=True),
    "fp8": _wire("fp8"),
    "fp8_group": _wire("fp8_group"),
    "tq3": _wire("tq3"),
    "fp8, host": _wire("fp8", transport="host"),
    "norm": Kind("MINLATENCY", dtypes=NARROW, norm=True),
    "norm, rounds": Kind("MINLATENCY", {"workspace_bytes": 8 << 20}, NARROW, MIB, norm=True),
    "norm in a kernel of its own": Kind("MINLATENCY", {"fuse_norm": False}, norm=True),
}


@dataclasses.dataclass
class Prepared:
    """A call that can be made again and again: what it reads, and what it must give for new values of that."""

    name: str
    input: torch.Tensor
    call: Callable[[], list[torch.Tensor]]
    refill: Callable[[int], list[torch.Tensor]]


@dataclasses.dataclass
class Kept:
    """A captured graph, its calls and what they have returned."""

    graph: torch.cuda.CUDAGraph
    calls: list[Prepared]
    outputs: list[list[torch.Tensor]]


def draw_size(generator: random.Random, largest: int) -> int:
    """Elements: mostly small, any remainder, now and then large."""
    power = generator.randint(0, max(1, largest.bit_length() - 1))
    size = generator.randint(1 << power, min(largest, (2 << power) - 1))
    return size if generator.random() < 0.5 else max(8, size // 8 * 8)


class Soak:
    """One rank's side."""

    def __init__(self, context: RankContext, largest: int, kinds: Collection[str] = KINDS) -> None:
        self.context = context
        self.largest = largest
        self.on_gpus = context.device.type == "cuda"
        self.stream = torch.cuda.Stream(context.device) if self.on_gpus else None  # type: ignore[no-untyped-call]
        self.kept: list[Kept] = []
        self.counts: Counter[str] = Counter()
        self.groups: dict[str, TensorParallelCommunicator] = {
            name: context.communicator(kind.strategy, **kind.settings)
            for name, kind in KINDS.items()
            if name in kinds and (self.on_gpus or not kind.gpus)
        }

    def prepare(self, generator: random.Random, largest: int, *, graph: bool) -> Prepared:
        """A call of any kind."""
        name = generator.choice(sorted(self.groups))
        kind = KINDS[name]
        dtype, largest = generator.choice(kind.dtypes), min(largest, kind.largest)
        if kind.norm:
            return self._with_norm(name, generator, dtype, largest)
        tensor = torch.empty(draw_size(generator, largest), dtype=dtype, device=self.context.device)
        if not graph and tensor.numel() > 8:
            tensor = tensor[generator.choice((0, 0, 0, 1, 3)) :]
        return self._plain(name, tensor)

    def _inputs(self, seed: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's new input; this rank's own is ``tensor``."""
        ranks, like = range(self.context.world_size), tensor.reshape(-1)
        inputs = [make_input(seed, rank, like.numel(), like.dtype, like.device) for rank in ranks]
        tensor.copy_(inputs[self.context.rank].view(tensor.shape))
        return inputs

    def _sum(self, seed: int, tensor: torch.Tensor) -> torch.Tensor:
        """New values in ``tensor``, and what an exact sum gives."""
        device, size = self.context.device, self.context.world_size
        tensor.copy_(make_input(seed, self.context.rank, tensor.numel(), tensor.dtype, device).view(tensor.shape))
        return rank_ordered_sum(seed, size, tensor.numel(), tensor.dtype, device)

    def _plain(self, name: str, tensor: torch.Tensor) -> Prepared:
        kind, group = KINDS[name], self.groups[name]
        out = group.registered_empty(tensor.shape, tensor.dtype) if kind.registered else None

        def refill(seed: int) -> list[torch.Tensor]:
            launch = group.explain(tensor.shape, tensor.dtype).launch
            if kind.strategy == "LOWPRECISION" and launch is not None and launch.wire_format is not None:
                return [expected_sum(launch, self._inputs(seed, tensor))]
            return [self._sum(seed, tensor)]

        return Prepared(name, tensor, lambda: [group.all_reduce(tensor, out)], refill)

    def _with_norm(self, name: str, generator: random.Random, dtype: torch.dtype, largest: int) -> Prepared:
        hidden, seed, device = generator.choice(HIDDEN), generator.getrandbits(32), self.context.device
        rows = draw_size(generator, max(2, largest // hidden))
        residual, weight = norm_answers.make_beside(seed, rows, hidden, dtype, device)
        tensor = torch.empty(rows, hidden, dtype=dtype, device=device)
        group = self.groups[name]

        def call() -> list[torch.Tensor]:
            answer = group.all_reduce_residual_rms_norm(tensor, residual, weight, EPS)
            assert answer.norm_out is not None
            return [answer.norm_out, answer.residual_out]

        def refill(seed: int) -> list[torch.Tensor]:
            total = self._sum(seed, tensor).view(tensor.shape)
            answer = norm_answers.expected(total, residual, weight, EPS, None)
            assert answer.norm_out is not None
            return [answer.norm_out, answer.residual_out]

        return Prepared(name, tensor, call, refill)

    def compare(self, outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> int:
        """Elements whose bits are wrong."""
        size = self.context.world_size
        pairs = zip(outputs, expected, strict=True)
        return sum(wrong_elements(output, right, exact=True, world_size=size) for output, right in pairs)

    def step(self, generator: random.Random) -> int:
        """Wrong elements of one step."""
        what, seed = generator.random(), generator.getrandbits(40)
        if what < 0.45 and self.kept:
            return self.replay(generator, seed)
        if what < 0.6 and self.on_gpus:
            self.capture(generator)
            return 0
        prepared = self.prepare(generator, self.largest, graph=False)
        expected = prepared.refill(seed)
        self.counts[f"eager {prepared.name}"] += 1
        return self.compare(prepared.call(), expected)

    def capture(self, generator: random.Random) -> None:
        """Keep a new graph; nothing runs yet."""
        largest = min(self.largest, 2 * MIB)
        calls = [self.prepare(generator, largest, graph=True) for _ in range(generator.randint(1, 3))]
        for prepared in calls:
            prepared.input.fill_(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            outputs = [prepared.call() for prepared in calls]
        if len(self.kept) >= GRAPHS_KEPT:
            del self.kept[generator.randrange(len(self.kept))]
        self.kept.append(Kept(graph, calls, outputs))
        self.counts.update(f"captured {prepared.name}" for prepared in calls)

    def replay(self, generator: random.Random, seed: int) -> int:
        """Wrong elements of a few replays of one graph."""
        kept = generator.choice(self.kept)
        wrong = 0
        for turn in range(generator.randint(1, 4)):
            expected = [prepared.refill(seed + turn * 8 + place) for place, prepared in enumerate(kept.calls)]
            for outputs in kept.outputs:
                for output in outputs:
                    output.fill_(float("nan"))
            kept.graph.replay()
            wrong += sum(self.compare(*pair) for pair in zip(kept.outputs, expected, strict=True))
            self.counts.update(f"replayed {prepared.name}" for prepared in kept.calls)
        return wrong

    def settle(self) -> None:
        """Let everything end."""
        if self.on_gpus:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Let go of everything."""
        self.settle()
        self.kept.clear()
        for group in self.groups.values():
            group.close()


_soak: list[Soak] = []


def start(context: RankContext, largest: int) -> None:
    _soak.append(Soak(context, largest))


def turn(context: RankContext, seed: int) -> tuple[int, dict[str, int]]:
    """STEPS_PER_TURN steps: wrong elements over all ranks, and counts so far."""
    generator = random.Random(seed)
    wrong = sum(_soak[0].step(generator) for _ in range(STEPS_PER_TURN))
    _soak[0].settle()
    return sum(context.gather(wrong)), dict(_soak[0].counts)


def finish(context: RankContext) -> None:
    _soak.pop().close()
    context.gather(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="0: two CPU ranks")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--largest", type=int, default=8 * MIB, help="elements of the largest message")
    parser.add_argument("--seed", type=int, default=None, help="to repeat a run; default: from the clock")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seed = time.time_ns() if arguments.seed is None else arguments.seed
    world_size = arguments.gpus or 2
    began = time.monotonic()
    turns = wrong = 0
    counts: dict[str, int] = {}
    with RankPool(world_size, "cuda" if arguments.gpus else "cpu") as pool:
        pool.run(start, arguments.largest, timeout_s=120)
        while time.monotonic() - began < arguments.seconds:
            bad, counts = pool.run(turn, seed + turns, timeout_s=120)[0]
            wrong += bad
            turns += 1
            if turns % 20 == 0 or bad:
                steps = turns * STEPS_PER_TURN
                print(f"{time.monotonic() - began:6.0f} s: {steps} steps, {wrong} wrong elements", flush=True)
        pool.run(finish)
    seconds, steps = time.monotonic() - began, turns * STEPS_PER_TURN
    print(f"{seconds:.0f} s, {steps} steps of {world_size} ranks, {wrong} wrong elements, seed {seed}")
    if arguments.out:
        run = {"seconds": round(seconds), "seed": seed, "steps": steps, "wrong_elements": wrong}
        rows = [{"what": what, "times": times} for what, times in sorted(counts.items())]
        write_record(arguments.out, rows, harness=__doc__, world_size=world_size, **run)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
