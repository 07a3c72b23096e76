"""The soak of soak.py for several ranks on one GPU, from one process: a soak for every GPU of a node at once.

    python benchmarks/soak_one_gpu.py --ranks 4 --seconds 600 --out benchmarks/h200/soak_one_gpu.json

Every rank has a workspace and a stream of its own. Every step draws an algorithm, a kind of launch (as usual, in many
rounds, with lanes that have one task each, waiting for flags, in stages, as a ring, over domains, through host memory,
inputs read in place), a dtype and a size, and either calls it eagerly, captures a new graph on every rank, or replays
one of those kept. The expected bits are those of the rank-ordered fp32 sum, of LOWPRECISION those of its oracle.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin.algorithms.staging import FEWEST_RANKS
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.measure.answers import make_input, rank_ordered_sum, wrong_elements
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.runtime.failures import failure_of
from tests.support.local_group import LocalGroup, message_of
from tests.support.low_precision import expected_sum

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRAPHS_KEPT = 8
KINDS: dict[str, dict[str, Any]] = {
    "in band": {"in_band": True},
    "in band, rounds": {"in_band": True, "workspace_mib": 2},
    "in band, split": {"in_band": True, "split": (2, 1)},
    "in band, split, rounds": {"in_band": True, "split": (1, 0), "workspace_mib": 2},
    "flagged": {"in_band": False, "workspace_mib": 4},
    "host": {"host": True},
    "host, rounds": {"host": True, "workspace_mib": 2},
    "tq3": {"in_band": False, "workspace_mib": 4, "wire_format": WireFormat.TQ3},
    "hadamard2, host": {"host": True, "workspace_mib": 4, "wire_format": WireFormat.HADAMARD2},
    "ring": {"in_band": False, "workspace_mib": 4, "algorithm": "ring"},
    "staged": {"in_band": False, "workspace_mib": 4, "staged": True, "lanes": 2},
    "tq3, staged": {"in_band": False, "workspace_mib": 4, "staged": True, "lanes": 2, "wire_format": WireFormat.TQ3},
    "hierarchical": {"in_band": False, "workspace_mib": 4, "algorithm": "hierarchical", "domains": (0, 0, 1, 1)},
    "hierarchical, host": {"host": True, "workspace_mib": 4, "algorithm": "hierarchical", "domains": (1, 0, 1, 0)},
    "tq3 ring, host": {"host": True, "workspace_mib": 4, "wire_format": WireFormat.TQ3, "algorithm": "ring"},
}


def _serves(kind: dict[str, Any], ranks: int) -> bool:
    """Domains are those of 4 ranks, and stages are for 3 and more."""
    return ranks == len(kind.get("domains", range(ranks))) and (ranks >= FEWEST_RANKS or "staged" not in kind)


PULLS = ("in band", "in band, rounds")
COMPRESSES = tuple(name for name in KINDS if name not in PULLS)


@dataclasses.dataclass
class Kept:
    """One graph per rank, with what they read and write."""

    kind: str
    algorithm: str
    graphs: list[torch.cuda.CUDAGraph]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


class Soak:
    """All ranks' side."""

    def __init__(self, ranks: int, largest: int) -> None:
        self.ranks = ranks
        self.largest = largest
        self.counts: Counter[str] = Counter()
        self.kept: list[Kept] = []
        self.groups = {
            name: LocalGroup(ranks, **{"lanes": 6, **kind}) for name, kind in KINDS.items() if _serves(kind, ranks)
        }
        self.device = torch.device("cuda", torch.cuda.current_device())

    def failures(self) -> list[str]:
        """Waits that have expired."""
        found = [(name, failure_of(workspace)) for name, group in self.groups.items() for workspace in group.workspaces]
        return [f"{name}: {failure}" for name, failure in found if failure is not None]

    def expected(self, seed: int, inputs: list[torch.Tensor], name: str, algorithm: str) -> torch.Tensor:
        """Fills the inputs anew; what every rank must get."""
        count, dtype = inputs[0].numel(), inputs[0].dtype
        for rank, tensor in enumerate(inputs):
            tensor.copy_(make_input(seed, rank, count, dtype, self.device))
        if algorithm == "LOWPRECISION":
            return expected_sum(self.groups[name].launch_of(algorithm, message_of(inputs[0])), inputs)
        return rank_ordered_sum(seed, self.ranks, count, dtype, self.device)

    def compare(self, outputs: list[torch.Tensor], expected: torch.Tensor) -> int:
        """Elements whose bits are wrong, over all ranks."""
        return sum(wrong_elements(output, expected, exact=True, world_size=self.ranks) for output in outputs)

    def step(self, generator: random.Random) -> int:
        """Wrong elements of one step."""
        kind, seed = generator.random(), generator.getrandbits(40)
        if kind < 0.4 and self.kept:
            return self.replay(generator.choice(self.kept), generator.randint(1, 4), seed)
        name = generator.choice(sorted(self.groups))
        more = ("PULL",) * (name in PULLS) + ("LOWPRECISION",) * (name in COMPRESSES)
        algorithm = generator.choice(("ONESHOT", "TWOSHOT", *more))
        power = generator.randint(0, self.largest.bit_length() - 2)
        size = generator.randint(1 << power, 2 << power)
        if algorithm == "PULL" or generator.random() < 0.5:
            size = max(8, size // 8 * 8)
        dtype = generator.choice(DTYPES[:2] if algorithm == "LOWPRECISION" else DTYPES)
        inputs = [torch.empty(size, dtype=dtype, device=self.device) for _ in range(self.ranks)]
        if kind < 0.55 and algorithm != "PULL":
            self.capture(name, algorithm, inputs, generator)
            return 0
        expected = self.expected(seed, inputs, name, algorithm)
        self.counts[f"eager {algorithm}, {name}"] += 1
        return self.compare(self.groups[name].all_reduce(algorithm, inputs), expected)

    def capture(self, name: str, algorithm: str, inputs: list[torch.Tensor], generator: random.Random) -> None:
        """Keep a new graph on every rank; nothing runs yet."""
        group = self.groups[name]
        outputs = [torch.empty_like(tensor) for tensor in inputs]
        graphs = []
        torch.cuda.synchronize()
        for rank in range(self.ranks):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=group.streams[rank]):
                group.start(rank, algorithm, inputs[rank], outputs[rank])
            graphs.append(graph)
        if len(self.kept) >= GRAPHS_KEPT:
            del self.kept[generator.randrange(len(self.kept))]
        self.kept.append(Kept(name, algorithm, graphs, inputs, outputs))
        self.counts[f"captured {algorithm}, {name}"] += 1

    def replay(self, kept: Kept, times: int, seed: int) -> int:
        """Wrong elements of a few replays of one graph."""
        wrong = 0
        streams = self.groups[kept.kind].streams
        for turn in range(times):
            expected = self.expected(seed + turn, kept.inputs, kept.kind, kept.algorithm)
            for output in kept.outputs:
                output.fill_(float("nan"))
            torch.cuda.synchronize()
            for graph, stream in zip(kept.graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            torch.cuda.synchronize()
            wrong += self.compare(kept.outputs, expected)
            self.counts[f"replayed {kept.algorithm}, {kept.kind}"] += 1
        return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--largest", type=int, default=1 << 20, help="elements of the largest message")
    parser.add_argument("--seed", type=int, default=None, help="to repeat a run; default: from the clock")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seed = time.time_ns() if arguments.seed is None else arguments.seed
    generator = random.Random(seed)
    soak = Soak(arguments.ranks, arguments.largest)
    began = time.monotonic()
    steps = wrong = 0
    try:
        while time.monotonic() - began < arguments.seconds:
            bad = soak.step(generator)
            if bad:
                print(f"step {steps}: {bad} wrong elements, seed {seed}", flush=True)
            wrong += bad
            steps += 1
        torch.cuda.synchronize()
    except Exception:
        print(f"step {steps} failed after {time.monotonic() - began:.0f} s, seed {seed}: {soak.failures()}", flush=True)
        raise
    seconds = time.monotonic() - began
    print(f"{seconds:.0f} s, {steps} steps, {arguments.ranks} ranks on one GPU, {wrong} wrong elements, seed {seed}")
    if arguments.out:
        run = {"seconds": round(seconds), "seed": seed, "steps": steps, "wrong_elements": wrong}
        rows = [{"what": what, "times": times} for what, times in sorted(soak.counts.items())]
        write_record(arguments.out, rows, harness=__doc__, world_size=arguments.ranks, **run)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
