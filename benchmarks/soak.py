"""A soak: random sizes, dtypes and strategies, eager calls and graphs interleaved, every answer compared bit for bit.

    python benchmarks/soak.py --gpus 4 --seconds 600 --out benchmarks/h200/soak.json

Every step draws a communicator (each strategy, with its usual workspace and with one so small that most messages
take many rounds), a dtype and a size, and either calls it eagerly, captures a new graph of one to three calls, or
replays one of the graphs kept, some of which are dropped on the way. Inputs are new at every step; the expected bits
are those of the rank-ordered fp32 sum. Ranks draw alike, and each compares its own outputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin import TensorParallelCommunicator
from llm_allreduce_plugin.measure.answers import make_input, rank_ordered_sum, wrong_elements
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool

STRATEGIES = ("ONESHOT", "TWOSHOT", "MINLATENCY")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRAPHS_KEPT = 12
STEPS_PER_TURN = 50
SMALL_WORKSPACE = 4 << 20
MIB = 1 << 20


@dataclasses.dataclass
class Kept:
    """A captured graph with what it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    name: str


def draw_size(generator: random.Random, largest: int) -> int:
    """Elements: mostly small, any remainder, now and then large."""
    power = generator.randint(0, max(1, largest.bit_length() - 1))
    size = generator.randint(1 << power, min(largest, (2 << power) - 1))
    return size if generator.random() < 0.5 else max(8, size // 8 * 8)


class Soak:
    """One rank's side."""

    def __init__(self, context: RankContext, largest: int) -> None:
        self.context = context
        self.largest = largest
        self.stream = torch.cuda.Stream(context.device)  # type: ignore[no-untyped-call]
        self.kept: list[Kept] = []
        self.counts: Counter[str] = Counter()
        self.groups: dict[str, TensorParallelCommunicator] = {}
        for strategy in STRATEGIES:
            for label, settings in (("", {}), (" small workspace", {"workspace_bytes": SMALL_WORKSPACE})):
                self.groups[strategy + label] = context.communicator(strategy, **settings)

    def fill(self, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        """New values for this rank's input; what every rank must then get."""
        rank, size, device = self.context.rank, self.context.world_size, self.context.device
        tensor.copy_(make_input(seed, rank, tensor.numel(), tensor.dtype, device))
        return rank_ordered_sum(seed, size, tensor.numel(), tensor.dtype, device)

    def compare(self, output: torch.Tensor, expected: torch.Tensor) -> int:
        """Elements whose bits are wrong."""
        return wrong_elements(output, expected, exact=True, world_size=self.context.world_size)

    def step(self, generator: random.Random) -> int:
        """Wrong elements of one step."""
        kind = generator.random()
        seed = generator.getrandbits(40)
        if kind < 0.45 and self.kept:
            return self.replay(generator, seed)
        name = generator.choice(sorted(self.groups))
        largest = self.largest // 8 if "small" in name else self.largest
        dtype = generator.choice(DTYPES)
        if kind < 0.6:
            return self.capture(generator, name, dtype, min(largest, 2 * MIB))
        tensor = torch.empty(draw_size(generator, largest), dtype=dtype, device=self.context.device)
        offset = generator.choice((0, 0, 0, 1, 3)) if tensor.numel() > 8 else 0
        tensor = tensor[offset:]
        expected = self.fill(tensor, seed)
        self.counts[f"eager {name}"] += 1
        return self.compare(self.groups[name].all_reduce(tensor), expected)

    def capture(self, generator: random.Random, name: str, dtype: torch.dtype, largest: int) -> int:
        """Keep a new graph; nothing runs yet."""
        device = self.context.device
        calls = generator.randint(1, 3)
        inputs = [torch.ones(draw_size(generator, largest), dtype=dtype, device=device) for _ in range(calls)]
        group = self.groups[name]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            outputs = [group.all_reduce(tensor) for tensor in inputs]
        if len(self.kept) >= GRAPHS_KEPT:
            del self.kept[generator.randrange(len(self.kept))]
        self.kept.append(Kept(graph, inputs, outputs, name))
        self.counts[f"captured {name}"] += calls
        return 0

    def replay(self, generator: random.Random, seed: int) -> int:
        """Wrong elements of a few replays of one graph."""
        kept = generator.choice(self.kept)
        wrong = 0
        for turn in range(generator.randint(1, 4)):
            expected = [self.fill(tensor, seed + turn * 8 + i) for i, tensor in enumerate(kept.inputs)]
            for output in kept.outputs:
                output.fill_(float("nan"))
            kept.graph.replay()
            wrong += sum(self.compare(*pair) for pair in zip(kept.outputs, expected, strict=True))
        self.counts[f"replayed {kept.name}"] += 1
        return wrong

    def close(self) -> None:
        """Let go of everything."""
        torch.cuda.synchronize()
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
    torch.cuda.synchronize()
    return sum(context.gather(wrong)), dict(_soak[0].counts)


def finish(context: RankContext) -> None:
    _soak.pop().close()
    context.gather(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--largest", type=int, default=8 * MIB, help="elements of the largest message")
    parser.add_argument("--seed", type=int, default=None, help="to repeat a run; default: from the clock")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seed = time.time_ns() if arguments.seed is None else arguments.seed
    pool = RankPool(arguments.gpus, "cuda")
    began = time.monotonic()
    turns = wrong = 0
    counts: dict[str, int] = {}
    try:
        pool.run(start, arguments.largest)
        while time.monotonic() - began < arguments.seconds:
            bad, counts = pool.run(turn, seed + turns, timeout_s=120)[0]
            wrong += bad
            turns += 1
            if turns % 20 == 0 or bad:
                print(f"{time.monotonic() - began:6.0f} s: {turns * STEPS_PER_TURN} steps, {wrong} wrong elements")
        pool.run(finish)
    finally:
        pool.close()
    seconds = time.monotonic() - began
    print(
        f"{seconds:.0f} s, {turns * STEPS_PER_TURN} steps on {arguments.gpus} GPUs, {wrong} wrong elements, seed {seed}"
    )
    if arguments.out:
        run = {"seconds": round(seconds), "seed": seed, "steps": turns * STEPS_PER_TURN, "wrong_elements": wrong}
        rows = [{"what": what, "times": times} for what, times in sorted(counts.items())]
        write_record(arguments.out, rows, harness=__doc__, world_size=arguments.gpus, **run)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
